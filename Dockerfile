# CPU:    docker build -t cddistill .
# CUDA:   docker build -t cddistill:gpu --build-arg EXTRAS=eval,gpu .     (docker run --gpus all ...; the wheels bring CUDA)
# Run:    docker run --rm -v "$PWD/runs:/runs" cddistill --config=cddistill:ccd_sr --workdir=/runs/ccd_sr
FROM python:3.12-slim
ARG EXTRAS=eval
WORKDIR /src
COPY constraints.txt setup.py pyproject.toml README.md LICENSE NOTICE ./
COPY cddistill cddistill
COPY configs configs
RUN pip install --no-cache-dir -c constraints.txt ".[${EXTRAS}]" && useradd --create-home --uid 1000 user
USER 1000
WORKDIR /home/user
ENTRYPOINT ["python", "-m", "cddistill.main"]
