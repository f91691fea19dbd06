"""What a text answers: finding the final answer, one spelling and exact value for it, and votes over several texts.

Pure functions of text on the standard library alone, so that what a policy serves is what a grader reads. Whether an
answer is right is for `pipelines.grading`.
"""
