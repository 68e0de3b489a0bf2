# Dynamic LoRA's server. BASE: any Debian-like image with Python 3.11+, its venv module and
# CA certificates.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
# cpu: the CPU build of torch, or, where no index has one, the general build (larger; it
# serves on CPUs as well). cuda: a build with CUDA, checked to be one.
ARG TORCH=cpu
# Where the CPU build is, besides pip's own index. Asked for torch alone.
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
# Where pip finds everything else, and a build with CUDA. Predefined names of pip.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python3 -m venv /opt/dynamic-lora
COPY constraints.txt ./
# torch first, in a layer of its own: by far the largest part, and the one that changes least.
RUN set -eu; \
    torch="$(grep '^torch==' constraints.txt)"; \
    pip="/opt/dynamic-lora/bin/pip install -c constraints.txt"; \
    case "$TORCH" in \
      cpu) $pip --no-deps ${TORCH_CPU_INDEX:+--extra-index-url "$TORCH_CPU_INDEX"} "$torch+cpu" || { \
echo "No index has a CPU build of $torch: taking the general build. Name one that has it with \
--build-arg TORCH_CPU_INDEX."; $pip "$torch"; } ;; \
      cuda) $pip "$torch"; /opt/dynamic-lora/bin/python -c 'import sys, torch; \
sys.exit(torch.version.cuda is None and "TORCH=cuda, but pip chose a build without CUDA: \
name an index that has one with --build-arg PIP_EXTRA_INDEX_URL.")' ;; \
      *) echo "TORCH=$TORCH: expected cpu or cuda." >&2; exit 1 ;; \
    esac
COPY . .
RUN /opt/dynamic-lora/bin/pip install -c constraints.txt '.[server]'

FROM ${BASE}
LABEL org.opencontainers.image.title="Dynamic LoRA" \
      org.opencontainers.image.licenses="Apache-2.0 AND CC-BY-4.0 AND CC-BY-SA-4.0"
# The server compiles its CPU kernels for the processor that it finds.
RUN apt-get update && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN groupadd --gid 10001 dynamic-lora \
    && useradd --uid 10001 --gid 10001 --create-home --shell /usr/sbin/nologin dynamic-lora \
    && install -d -o dynamic-lora -g dynamic-lora /var/lib/dynamic-lora /var/cache/dynamic-lora
COPY --from=build /opt/dynamic-lora /opt/dynamic-lora
# XDG_CACHE_HOME and HF_HOME: the converted base model and Hub downloads, kept in one volume.
ENV PATH=/opt/dynamic-lora/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/var/cache/dynamic-lora \
    HF_HOME=/var/cache/dynamic-lora/huggingface \
    DYNAMIC_LORA_LISTEN_HOST=0.0.0.0 \
    DYNAMIC_LORA_LISTEN_PORT=8000
# As numbers: what is to be no root user must be known as such without the image's passwd.
USER 10001:10001
WORKDIR /home/dynamic-lora
VOLUME ["/var/lib/dynamic-lora", "/var/cache/dynamic-lora"]
EXPOSE 8000
# The first start fetches the base model, so it gets time; until then /ready answers 503.
HEALTHCHECK --interval=15s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request as r; r.urlopen(f\"http://127.0.0.1:{os.environ['DYNAMIC_LORA_LISTEN_PORT']}/ready\", timeout=4)"]
ENTRYPOINT ["dynamic-lora"]
CMD ["serve", "--home", "/var/lib/dynamic-lora"]
