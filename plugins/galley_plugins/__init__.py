"""What runs inside a vLLM process: tasks, pooling and models that an unmodified vLLM loads as plugins."""
