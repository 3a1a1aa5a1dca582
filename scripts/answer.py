"""Asks an exported model by transformers alone: needs torch and transformers, nothing of this repository.

    uv run --isolated --no-project --with torch==2.15.0 --with transformers==5.3.0 \\
      python scripts/answer.py exported "Write a story about a mole named Milo who is afraid of the dark."

Takes the most probable token each time, 256 at most, as `chat.py --temperature 0` does.
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

folder, question = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
messages = [{"role": "user", "content": question}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
length = prompt["input_ids"].shape[1]
# The last token need not be read, so one more than the context fits.
room = min(256, model.config.max_position_embeddings + 1 - length)
answer = model.generate(**prompt, do_sample=False, max_new_tokens=room)
print(tokenizer.decode(answer[0, length:], skip_special_tokens=True))
