"""Files of llama.cpp: what one holds, by the ``gguf`` package of its authors, and its names and layout as ours."""
