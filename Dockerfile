# acestep-lora on an NVIDIA GPU, or on the CPU.    docker build -t acestep-lora .
# torch's wheels bring CUDA's libraries; the host brings the driver and the NVIDIA Container Toolkit.
FROM python:3.12-slim

# g++ is for hardware.compile=true, git for pip
RUN apt-get update && apt-get install -y --no-install-recommends g++ git && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY acestep_lora/__init__.py acestep_lora/
RUN pip install --no-cache-dir -e '.[studio,formats]'
COPY . .

# Everything a run leaves goes here: models, songs, runs, and the hub's cache
ENV HF_HOME=/work/.huggingface XDG_CACHE_HOME=/work/.cache PYTHONPATH=/app
WORKDIR /work
VOLUME /work

ENTRYPOINT ["python"]
CMD ["/app/train.py", "--help"]
