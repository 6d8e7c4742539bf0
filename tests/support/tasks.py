"""A few examples of each evaluation task, in the fields of its file in data/tasks."""

ROWS = {
    "arc_easy": [
        {"id": str(i), "query": f"Question: Which model reads {i} tokens?\nAnswer:", "gold": i % 3,
         "choices": ["the small model", "the large model", "no model", "all", "some"][: 3 + i % 3]} for i in range(7)
    ],
    "piqa": [{"goal": f"read {i} shards", "sol1": "open the file", "sol2": "eat", "label": i % 2} for i in range(5)],
    "sciq": [
        {"question": f"What is {i}?", "support": " A number is written in digits." * (i % 2), "distractor1": "a token",
         "distractor2": "a shard", "distractor3": "a model", "correct_answer": "a number"} for i in range(4)
    ],
    "lambada": [{"query": f"the model reads a shard of data, and {i} writes a", "answer": "shard"} for i in range(6)],
    "blimp": [{"UID": f"p{i % 2}", "sentence_good": f"The model reads {i}.", "sentence_bad": f"The model read {i} it."}
              for i in range(4)],
}  # fmt: skip
