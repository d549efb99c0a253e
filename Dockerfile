# The repository with everything that `make test` needs. Written from the Makefile; not built by its authors.
#   docker build -t pgolf . && docker run --rm -it -v "$PWD/out:/pgolf/out" pgolf make try-me
FROM python:3.12-slim-bookworm
RUN apt-get update && apt-get install -y --no-install-recommends build-essential chromium git make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /pgolf
COPY setup.py settings.ini constraints.txt pyproject.toml Makefile README.md ./
COPY pgolf pgolf
RUN PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make env
COPY . .
ENV PATH=/pgolf/.venv/bin:$PATH
CMD ["make", "help"]
