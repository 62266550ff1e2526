# SPDX-License-Identifier: Apache-2.0
#
# docker build -t blockemu .
# docker run -v "$PWD:/images" -p 127.0.0.1:10809:10809 blockemu serve /images/disk.qcow2 --bind 0.0.0.0
#
# The daemon runs as user 10809, which must be able to write the image (or say --user "$(id -u)").
# BASE is any Debian or Ubuntu with Python 3.11 or newer; `make image-test` gives its own.

ARG BASE=debian:bookworm-slim

FROM ${BASE} AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        gcc libaio-dev libc6-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/blockemu
COPY . /src
RUN /opt/blockemu/bin/pip install --no-cache-dir /src

FROM ${BASE}
# The library's package was renamed when time_t grew; the expression takes either.
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 '^libaio1(t64)?$' \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10809 --user-group --no-create-home blockemu \
    && install -d -o blockemu -g blockemu /images
COPY --from=build /opt/blockemu /opt/blockemu
ENV PATH=/opt/blockemu/bin:$PATH
USER blockemu
WORKDIR /images
VOLUME /images
EXPOSE 10809
ENTRYPOINT ["blockemu"]
CMD ["--help"]
