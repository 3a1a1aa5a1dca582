"""Answer one question with an exported model. Needs torch and transformers, but nothing of this repository.

    uv run --isolated --no-project --with torch==2.15.0 --with transformers==5.3.0 \\
      python scripts/answer.py exported "Write a story about a mole named Milo who is afraid of the dark."

Takes the most probable token each time and at most 256 tokens, like `chat.py --temperature 0`.
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

folder, question = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
messages = [{"role": "user", "content": question}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
prompt_length = prompt["input_ids"].shape[1]

# The last generated token is never an input, so the text may be one token longer than the context.
max_new_tokens = min(256, model.config.max_position_embeddings + 1 - prompt_length)
answer = model.generate(**prompt, do_sample=False, max_new_tokens=max_new_tokens)
print(tokenizer.decode(answer[0, prompt_length:], skip_special_tokens=True))
