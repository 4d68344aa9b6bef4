# One image for every role: `sluice ...`, `celery -A sluice worker -Q QUEUE`, `python -m sluice.trainer`.
# --build-arg EXTRAS=tensorboard adds an optional dependency.
FROM python:3.11-slim

# Triton, under torch, compiles its launchers when it runs.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# uid 1000 also owns the policies volume of docker-compose.yml. Volumes take the owner of the folder they cover.
RUN useradd --create-home --uid 1000 sluice \
    && install --directory --owner sluice --group sluice /app /app/runs /policies /home/sluice/.cache /home/sluice/.cache/huggingface

WORKDIR /app
ARG EXTRAS=""
COPY . .
RUN pip install --no-cache-dir ".${EXTRAS:+[$EXTRAS]}"

USER sluice
ENV PYTHONUNBUFFERED=1
CMD ["sluice", "--help"]
