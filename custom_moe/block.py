"""LitGPT's transformer block, able to hand out what the router of its MoE decided."""

import litgpt.model
from litgpt import Config
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from custom_moe.layer import MoE
from custom_moe.router import RouterOutput

_StockMoE = litgpt.model.LLaMAMoE


class MoEBlock(litgpt.model.Block):  # type: ignore[misc]  # litgpt is not typed
    """``litgpt.model.Block`` with ``return_router_output``. Its first ``first_k_dense_replace`` layers are dense."""

    def __init__(self, config: Config, block_idx: int) -> None:
        super().__init__(config, block_idx)
        if isinstance(self.mlp, _StockMoE):
            raise TypeError("this block got LitGPT's own LLaMAMoE; build it within `with use_custom_moe():`.")

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None = None,
        input_pos: Tensor | None = None,
        input_pos_maxp1: int | None = None,
        return_router_output: bool = False,
        recompute_mlp: bool = False,
    ) -> Tensor | tuple[Tensor, RouterOutput | None]:
        """``litgpt.model.Block.forward``, and where asked for also the router's output.

        Args:
            return_router_output: see below.
            recompute_mlp: keep nothing of the feed-forward for the backward, but compute it again (with
                ``return_router_output``).

        Returns:
            ``(B, T, C)``; with ``return_router_output`` the pair of it and the ``RouterOutput``, or None where the
            block's feed-forward is dense.
        """
        if not return_router_output:
            y: Tensor = super().forward(x, cos, sin, mask, input_pos, input_pos_maxp1)
            return y

        # Line by line LitGPT's, up to the call of the MoE.
        x_normed = self.norm_1(x)
        attention_output = self.attn(x_normed, cos, sin, mask, input_pos, input_pos_maxp1)
        attention_output = self.post_attention_norm(attention_output)
        if self.config.parallel_residual:
            if not self.config.shared_attention_norm:
                x_normed = self.norm_2(x)
            x = attention_output + x
        else:
            x = attention_output + x
            x_normed = self.norm_2(x)

        if recompute_mlp:
            mlp_output, router = checkpoint(self._feed_forward, x_normed, use_reentrant=False)
        else:
            mlp_output, router = self._feed_forward(x_normed)
        return self.post_mlp_norm(mlp_output) + x, router

    def _feed_forward(self, x: Tensor) -> tuple[Tensor, RouterOutput | None]:
        return self.mlp.forward_with_router(x) if isinstance(self.mlp, MoE) else (self.mlp(x), None)
