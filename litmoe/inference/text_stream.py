"""From tokens to text while they are generated: incremental decoding and stop sequences."""

from collections.abc import Sequence

from litgpt import Tokenizer
from tokenizers.decoders import DecodeStream

_MAX_WAITING = 32
"""After this many tokens in a row that end within a character, they are returned as U+FFFD, because they are no text.
Each step decodes all waiting tokens, so without a limit a model that writes only such tokens would get slower."""


class TextStream:
    """Decode the tokens of one sample as they come. Bytes of an unfinished character wait for the rest of it.

    The pieces together equal the text of all tokens decoded at once. Decoding each token alone would not: for example,
    SentencePiece-like tokenizers drop the space before the first token that they decode.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        """Start a text.

        Args:
            tokenizer: one of LitGPT.
            context: tokens that the sample continues, such as its prompt. Empty for an answer, because answers are
                tokenized on their own in training.
        """
        self._processor = tokenizer.processor
        added = self._processor.get_added_tokens_decoder()
        self._special = {id for id, token in added.items() if token.special}
        context = [token for token in context if token not in self._special]
        complete = self._complete_tokens(context)
        # The last tokens that were returned as text; the text of the next tokens depends on them
        self._before = context[:complete]
        self._waiting: list[int] = []
        # Characters that the decoder returns again, because its first tokens end within a character.
        self._repeated = 0
        self._stream = DecodeStream(self._before, skip_special_tokens=True)
        for token in context[complete:]:
            self.push(token)

    def push(self, token: int) -> str:
        """Add a token and return the text that is certain now: often a word, sometimes nothing."""
        # Special tokens have no text. DecodeStream would keep them and get slower with each.
        if token in self._special:
            return ""
        self._waiting.append(token)
        try:
            text = self._stream.step(self._processor, token)
        except Exception:
            # The library tokenizers has no class for it: a stray byte changed the text of the bytes before it.
            return self._restart()
        if text is None:
            return self._restart() if len(self._waiting) == _MAX_WAITING else ""
        text = text[self._repeated :]
        self._repeated = 0
        self._mark_returned()
        return text

    def flush(self) -> str:
        """Return the rest at the end of a sample; an unfinished character becomes U+FFFD."""
        # The difference of two texts, because the text of a token depends on those before it.
        text = self._decode([*self._before, *self._waiting])[len(self._decode(self._before)) :]
        self._mark_returned()
        return text

    def _complete_tokens(self, context: list[int]) -> int:
        """Return how many tokens of the context to treat as text that was returned already.

        If the context ends within a character (of at most four bytes), the character belongs to the sample.
        """
        size = len(context)
        for end in range(size, max(size - 4, -1), -1):
            if not self._decode(context[:end]).endswith("\ufffd"):
                return end
        return size

    def _mark_returned(self) -> None:
        # Only the last tokens have an effect on the next one, and decoding all would get slower and slower.
        self._before = [*self._before, *self._waiting][-2 * _MAX_WAITING :]
        self._waiting = []

    def _restart(self) -> str:
        """Return the rest, and start a new decoder after it."""
        text = self.flush()
        self._stream = DecodeStream(self._before, skip_special_tokens=True)
        returned = self._decode(self._before)
        self._repeated = len(returned) if returned.endswith("\ufffd") else 0
        return text

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._processor.decode(tokens, skip_special_tokens=True)
        return text


class StopSequences:
    """Detect the end of one sample in its tokens, and hold back tokens that may start a stop sequence."""

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        self.sequences = [list(sequence) for sequence in sequences]
        self.held: list[int] = []  # tokens that are held back

    def push(self, token: int) -> tuple[list[int], bool]:
        """Add a token.

        Returns:
            The tokens that are certain to be text now, and whether the sample has ended.
        """
        self.held.append(token)
        for sequence in self.sequences:
            if self.held[-len(sequence) :] == sequence:
                return self.held[: -len(sequence)], True
        # The longest end of the tokens that a stop sequence starts with may become that sequence.
        hold = max((self._overlap(sequence) for sequence in self.sequences), default=0)
        split = len(self.held) - hold
        certain, self.held = self.held[:split], self.held[split:]
        return certain, False

    def _overlap(self, sequence: list[int]) -> int:
        # Longest first. A complete sequence was found before, so at least its last token is missing.
        for size in range(len(sequence) - 1, 0, -1):
            if self.held[-size:] == sequence[:size]:
                return size
        return 0


class StopStrings:
    """Detect strings that end one sample in its text, and hold back text that may be the beginning of one."""

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings = strings
        self.held = ""  # text that is held back

    def push(self, text: str) -> tuple[str, bool]:
        """Add text; a string may begin in one call and end in a later one.

        Returns:
            The text that is certain now, and whether the sample has ended.
        """
        text = self.held + text
        found = [start for string in self.strings if (start := text.find(string)) >= 0]
        if found:
            return text[: min(found)], True
        hold = max((self._overlap(text, string) for string in self.strings), default=0)
        split = len(text) - hold
        self.held = text[split:]
        return text[:split], False

    @staticmethod
    def _overlap(text: str, string: str) -> int:
        """Return the length of the longest end of the text that the string begins with."""
        longest = min(len(text), len(string) - 1)
        return next((size for size in range(longest, 0, -1) if text.endswith(string[:size])), 0)
