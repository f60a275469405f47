# The image of docker-compose.yaml: katcore with Airflow and MLflow, as an ordinary user.
FROM python:3.11-slim-bookworm
RUN apt-get update \
    && apt-get install --yes --no-install-recommends curl g++ git \
    && rm -rf /var/lib/apt/lists/* \
    && pip install --no-cache-dir uv \
    && useradd --create-home kat \
    && install --directory --owner kat /kat
WORKDIR /opt/katcore
COPY . .
RUN uv pip install --system --no-cache -c constraints/py311.txt '.[postgres]'
USER kat
