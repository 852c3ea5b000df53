# The service, as two images:
#
#   docker build -t drorae .                     # target cpu, the default
#   docker build -t drorae:cuda --target cuda .
#
# To pin the base image by content and not only by name, read its digest once and name both:
#   docker buildx imagetools inspect python:3.11.15-slim-bookworm
#   docker build --build-arg PYTHON_IMAGE=python:3.11.15-slim-bookworm@sha256:... .
ARG PYTHON_IMAGE=python:3.11.15-slim-bookworm


# The project's wheel, so that nothing of the source tree but the packages reaches the image.
FROM ${PYTHON_IMAGE} AS wheel
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python -m venv /opt/build
# The build backend in the one version that pyproject.toml and the lock name; no isolated, unpinned environment.
COPY requirements.lock ./
RUN grep '^setuptools==' requirements.lock > setuptools.lock \
    && /opt/build/bin/pip install --requirement setuptools.lock
COPY pyproject.toml README.md LICENSE ./
COPY kernels ./kernels
COPY model ./model
COPY service ./service
COPY training ./training
COPY cli ./cli
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheels .


# What both environments have in common: a virtual environment without pip, which the image does not need.
FROM ${PYTHON_IMAGE} AS environment
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_COMPILE=1
WORKDIR /build
RUN python -m venv --without-pip /opt/drorae
COPY requirements.lock ./


# torch comes from the index of CPU builds, and from no other: PyPI's brings gigabytes of CUDA libraries. Triton
# stays out as well; only the GPU kernels import it, and it is as large as torch.
FROM environment AS environment-cpu
# A mirror, if there is one.
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
RUN grep '^torch==' requirements.lock > torch.lock \
    && grep -v '^triton==' requirements.lock > cpu.lock \
    && python -m pip --python /opt/drorae/bin/python install \
        --no-deps --index-url "${TORCH_INDEX_URL}" --requirement torch.lock \
    && python -m pip --python /opt/drorae/bin/python install --requirement cpu.lock
COPY --from=wheel /wheels /wheels
# Removed: headers, C++ tests and their programs, which serve extensions and torch's own tests; torch_shm_manager
# stays. Libraries are not stripped: wheels come stripped, and strip breaks those that auditwheel has rewritten.
# Bytecode is made here, since nobody can write it later; checked against nothing, since no source changes. torch's
# own test helpers are left out: some are in a later Python's syntax.
RUN python -m pip --python /opt/drorae/bin/python install --no-deps --no-index --find-links /wheels drorae \
    && torch=/opt/drorae/lib/python3.11/site-packages/torch \
    && rm -rf "$torch/include" "$torch/test" "$torch/share" \
    && find "$torch/bin" -type f ! -name torch_shm_manager -delete \
    && /opt/drorae/bin/python -m compileall -q --invalidation-mode unchecked-hash \
        -x /torch/testing/_internal/ /opt/drorae/lib


# The plain index's torch is built for CUDA and brings its libraries as wheels, so that no CUDA base image is
# needed; only the driver comes from the host. Headers that Triton compiles against are its own.
FROM environment AS environment-cuda
COPY deploy/requirements-cuda.lock ./
RUN python -m pip --python /opt/drorae/bin/python install \
        --constraint requirements-cuda.lock --requirement requirements.lock
COPY --from=wheel /wheels /wheels
RUN python -m pip --python /opt/drorae/bin/python install --no-deps --no-index --find-links /wheels drorae \
    && torch=/opt/drorae/lib/python3.11/site-packages/torch \
    && rm -rf "$torch/include" "$torch/test" "$torch/share" \
    && find "$torch/bin" -type f ! -name torch_shm_manager -delete \
    && /opt/drorae/bin/python -m compileall -q --invalidation-mode unchecked-hash \
        -x /torch/testing/_internal/ /opt/drorae/lib


# What runs. The root may be read-only: only /tmp is written to, and with CUDA also Triton's cache.
FROM ${PYTHON_IMAGE} AS runtime
ARG PYTHON_IMAGE
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="DRoRAE" \
      org.opencontainers.image.description="Image tokenizer service: images to enriched latents, and back" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${PYTHON_IMAGE}"
# A number, so that an orchestrator can see that it is not root.
RUN groupadd --gid 10001 drorae \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin drorae
ENV PATH=/opt/drorae/bin:$PATH \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    DRORAE_HOST=0.0.0.0 \
    DRORAE_PORT=8000 \
    DRORAE_LOG_FORMAT=json
# Relative paths of checkpoints start here: mount a directory of them.
WORKDIR /checkpoints
EXPOSE 8000
STOPSIGNAL SIGTERM
# Readiness, not liveness: "healthy" is what other containers, `up --wait` and Swarm's routing wait for, so it must
# mean that requests are taken. Nothing is killed for want of liveness: a process whose engine hangs ends by itself,
# with status 3. Isolated and without site, so that a check costs no more than the interpreter's start.
HEALTHCHECK --interval=5s --timeout=4s --start-period=120s --retries=2 \
    CMD ["python", "-I", "-S", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ['DRORAE_PORT']), timeout=3); c.request('GET', '/readyz'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["drorae", "serve"]


FROM runtime AS cuda
# Triton compiles its launchers with the system's C compiler when the service starts; Python's headers are in the
# base image. Without them the service refuses to start on a GPU, unless DRORAE_FUSION=folded.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && install --directory --owner 10001 --group 10001 --mode 0700 /var/cache/drorae
# What a CUDA base image would set: the container runtime reads it. The cache holds shared objects, so a tmpfs in
# its place must be mounted with exec.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    DRORAE_DEVICE=cuda \
    TRITON_CACHE_DIR=/var/cache/drorae
COPY --from=environment-cuda /opt/drorae /opt/drorae
USER 10001:10001


FROM runtime AS cpu
ENV DRORAE_DEVICE=cpu
COPY --from=environment-cpu /opt/drorae /opt/drorae
USER 10001:10001
