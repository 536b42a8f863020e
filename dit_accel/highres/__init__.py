"""Resolution methods: generating larger than a model was trained for."""
