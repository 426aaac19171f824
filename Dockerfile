# lora_ms for the CPU:   docker build -t lora_ms .
#   docker run -it --rm -v "$PWD:/data" -w /data lora_ms lora-ms finetune --load_checkpoint MODEL --train_dataset_dir ROWS
# Native operators are compiled at the first start, into /cache: keep it with -v lora_ms_cache:/cache.
FROM python:3.11-slim

RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/lora_ms
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE run_mindformer.py ./
COPY requirements requirements
COPY configs configs
COPY scripts scripts
COPY lora_ms lora_ms
RUN pip install --no-cache-dir --constraint requirements/tested.txt ".[gguf,modelscope]"

RUN useradd --create-home user && mkdir /cache /data && chown user /cache /data
USER user
ENV LORA_MS_CACHE=/cache HF_HOME=/cache/huggingface
WORKDIR /data
CMD ["lora-ms", "--help"]
