# One image for every verb: `docker run IMAGE work`, `docker run IMAGE migrate`, ...
# It needs no writable file system and no name for its user.
ARG PYTHON_IMAGE=python:3.12-slim

FROM ${PYTHON_IMAGE} AS dependencies
WORKDIR /build
# What built-in callbacks need: docker build --build-arg EXTRAS="nats blob" .
ARG EXTRAS=""
# Only the locks: this layer is made anew when a dependency changes, not when we do.
COPY requirements/run.txt requirements/extra-*.txt ./
RUN python -m venv --without-pip /opt/venv \
    && for list in run.txt $(printf 'extra-%s.txt ' ${EXTRAS}); do \
        [ "$list" = extra-.txt ] || python -m pip --python /opt/venv/bin/python install \
            --compile --no-cache-dir --no-input --require-hashes --root-user-action=ignore \
            -r "$list" || exit 1; \
    done

FROM ${PYTHON_IMAGE} AS service
# HOME: a numeric user has no entry in /etc/passwd, and drivers look there for it.
# PORT: `serve` and `work` listen there, and the health check asks there.
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/srv \
    PORT=8000 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
WORKDIR /srv
COPY --from=dependencies /opt/venv /opt/venv
COPY alembic.ini ./
COPY migrations ./migrations
COPY app ./app
# A volume that is mounted at /archive belongs to the user of the service.
RUN python -m compileall -q app migrations \
    && install -d -o 10001 -g 10001 -m 700 /archive
USER 10001:10001
EXPOSE 8000
# Alive, not ready: a database that is away is no reason to restart the receiver.
HEALTHCHECK --interval=10s --timeout=5s --start-period=15s --retries=3 \
    CMD ["python", "-c", "import http.client as h, os, sys; c = h.HTTPConnection('127.0.0.1', int(os.environ.get('PORT') or 8000), timeout=4); c.request('GET', '/livez'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["python", "-m", "app"]
CMD ["serve", "--only", "webhooks", "--host", "0.0.0.0"]
