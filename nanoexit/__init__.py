"""nanoexit: early exits for Llama- and Qwen-style transformers, so that models write their reasoning down."""
