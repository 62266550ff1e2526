/* SPDX-License-Identifier: Apache-2.0
 *
 * A lean NBD client: load that costs less than what it loads.
 *
 * fio with libnbd takes some 5 us of processor time per 4 KiB request, of which it makes three system
 * calls; at depth 32 its core is full before a fast server's is, and then it is fio that is measured.
 * This sends all requests that are due with one sendmsg, and takes all replies that are there with one
 * recv. Like fio it sleeps when there is nothing to do, and knows each request's latency.
 *
 * It checks each reply: magic, error, and that its cookie is in flight. Data isn't looked at. Replies
 * are simple ones, or if STYLE says so structured ones (20 bytes of header) or extended ones (32, and
 * requests of 32 bytes).
 *
 * Usage: lean_client SOCKET EXPORT read|write BLOCK_BYTES DEPTH MILLISECONDS [STYLE]. STYLE is simple,
 * structured or extended. Random offsets. Prints JSON in the shape of fio's. */

#include <endian.h>
#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define OPTION_MAGIC 0x49484156454F5054ULL /* "IHAVEOPT" */
#define REQUEST_MAGIC 0x25609513U
#define REPLY_MAGIC 0x67446698U
#define STRUCTURED_REPLY_MAGIC 0x668E33EFU
#define EXTENDED_REQUEST_MAGIC 0x21E41C71U
#define EXTENDED_REPLY_MAGIC 0x6E8A278CU

enum { OPT_GO = 7, OPT_STRUCTURED_REPLY = 8, OPT_EXTENDED_HEADERS = 11 };
enum { REP_ACK = 1, REP_INFO = 3, INFO_EXPORT = 0 };
enum { CMD_READ = 0, CMD_WRITE = 1, CMD_DISC = 2, FLAG_PAYLOAD_LEN = 1 << 5 };
enum { CHUNK_DONE = 1, CHUNK_ERRORS = 1 << 15 };
enum { SIMPLE, STRUCTURED, EXTENDED };
enum {
    REQUEST_BYTES = 28,
    EXTENDED_BYTES = 32, /* of requests' headers and replies' alike */
    REPLY_BYTES = 16,
    STRUCTURED_BYTES = 20,
    DEPTH_MAX = 256,
    BLOCK_MAX = 2 << 20,
    INPUT_BYTES = 1 << 20,
    SUB_BUCKETS = 16, /* of each power of two of the latency histogram */
    BUCKETS = 64 * SUB_BUCKETS,
};

struct slot {
    uint64_t cookie; /* 0: free */
    uint64_t started_ns;
    char header[EXTENDED_BYTES];
};

static int fd;
static int is_write, style;
static size_t header_bytes; /* of a request */
static uint32_t block_bytes, depth;
static uint64_t blocks; /* of the disk */
static struct slot slots[DEPTH_MAX];
static uint32_t unsent[DEPTH_MAX]; /* slots whose requests aren't sent, a ring */
static uint32_t unsent_first, unsent_count;
static size_t first_sent; /* bytes of the first of them that have left */
static uint32_t in_flight;
static uint64_t serial, random_state = 0x9E3779B97F4A7C15ULL;
static char payload[BLOCK_MAX], input[INPUT_BYTES];
static size_t input_filled;
static uint64_t skip; /* bytes of the current reply's data that are still to come */
static uint64_t requests, latency_sum_ns, histogram[BUCKETS];

static void die(const char *what)
{
    fprintf(stderr, "lean_client: %s\n", what);
    exit(1);
}

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void put16(char *at, uint16_t value) { value = htobe16(value); memcpy(at, &value, 2); }
static void put32(char *at, uint32_t value) { value = htobe32(value); memcpy(at, &value, 4); }
static void put64(char *at, uint64_t value) { value = htobe64(value); memcpy(at, &value, 8); }
static uint16_t get16(const char *at) { uint16_t v; memcpy(&v, at, 2); return be16toh(v); }
static uint32_t get32(const char *at) { uint32_t v; memcpy(&v, at, 4); return be32toh(v); }
static uint64_t get64(const char *at) { uint64_t v; memcpy(&v, at, 8); return be64toh(v); }

/* --- before the load: blocking --- */

static void send_all(const char *data, size_t length)
{
    if (send(fd, data, length, MSG_NOSIGNAL) != (ssize_t)length)
        die("the server hung up");
}

static void receive_all(char *data, size_t length)
{
    if (length > 0 && recv(fd, data, length, MSG_WAITALL) != (ssize_t)length)
        die("the server hung up");
}

/* Asks for replies of the style. */
static void negotiate_style(void)
{
    char data[1024];

    if (style == SIMPLE)
        return;
    put64(data, OPTION_MAGIC);
    put32(data + 8, style == STRUCTURED ? OPT_STRUCTURED_REPLY : OPT_EXTENDED_HEADERS);
    put32(data + 12, 0);
    send_all(data, 16);
    receive_all(data, 20);
    if (get32(data + 12) != REP_ACK)
        die("the server doesn't know this style of replies");
}

/* Asks for the export. Returns its size. Source: the NBD protocol, "Fixed newstyle negotiation". */
static uint64_t negotiate(const char *export)
{
    uint32_t name_bytes = (uint32_t)strlen(export);
    uint64_t size = 0;
    char data[4096];

    receive_all(data, 18);
    if (memcmp(data, "NBDMAGICIHAVEOPT", 16) != 0 || name_bytes > 1024)
        die("no NBD server, or a name too long");
    put32(data, get16(data + 16) & 3);
    send_all(data, 4);
    negotiate_style();
    put64(data, OPTION_MAGIC);
    put32(data + 8, OPT_GO);
    put32(data + 12, 4 + name_bytes + 2);
    put32(data + 16, name_bytes);
    memcpy(data + 20, export, name_bytes);
    put16(data + 20 + name_bytes, 0);
    send_all(data, 20 + name_bytes + 2);
    for (;;) {
        uint32_t kind, length;

        receive_all(data, 20);
        kind = get32(data + 12);
        length = get32(data + 16);
        if (length > sizeof data)
            die("an option reply too long");
        receive_all(data, length);
        if (kind == REP_ACK)
            return size;
        if (kind != REP_INFO)
            die("the server refuses the export");
        if (length >= 12 && get16(data) == INFO_EXPORT)
            size = get64(data + 2);
    }
}

static void dial(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};

    if (strlen(path) >= sizeof address.sun_path)
        die("the socket's path is too long");
    strcpy(address.sun_path, path);
    fd = socket(AF_UNIX, SOCK_STREAM, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address) != 0)
        die("can't connect");
}

/* --- the load --- */

static uint64_t some_offset(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state % blocks * block_bytes;
}

static void put_header(char *header, uint16_t command, uint64_t cookie, uint64_t offset,
                       uint32_t length)
{
    int has_payload = style == EXTENDED && command == CMD_WRITE;

    put32(header, style == EXTENDED ? EXTENDED_REQUEST_MAGIC : REQUEST_MAGIC);
    put16(header + 4, has_payload ? FLAG_PAYLOAD_LEN : 0);
    put16(header + 6, command);
    put64(header + 8, cookie);
    put64(header + 16, offset);
    if (style == EXTENDED)
        put64(header + 24, length);
    else
        put32(header + 24, length);
}

/* Puts a request into a free slot; send_due will send it. */
static void begin(uint32_t index)
{
    struct slot *slot = &slots[index];

    slot->cookie = ++serial << 16 | index;
    put_header(slot->header, is_write ? CMD_WRITE : CMD_READ, slot->cookie, some_offset(),
               block_bytes);
    unsent[(unsent_first + unsent_count++) % DEPTH_MAX] = index;
    in_flight++;
}

/* The parts of all unsent requests, from the first byte that hasn't left. */
static size_t gather(struct iovec *parts, uint64_t time_ns)
{
    size_t count = 0, gone = first_sent;

    for (uint32_t i = 0; i < unsent_count; i++) {
        struct slot *slot = &slots[unsent[(unsent_first + i) % DEPTH_MAX]];

        if (gone == 0)
            slot->started_ns = time_ns;
        if (gone < header_bytes) {
            parts[count].iov_base = slot->header + gone;
            parts[count++].iov_len = header_bytes - gone;
            gone = header_bytes;
        }
        if (is_write) {
            parts[count].iov_base = payload + (gone - header_bytes);
            parts[count++].iov_len = block_bytes - (gone - header_bytes);
        }
        gone = 0;
    }
    return count;
}

static void send_due(void)
{
    struct iovec parts[2 * DEPTH_MAX];
    struct msghdr message = {.msg_iov = parts};
    size_t whole = header_bytes + (is_write ? block_bytes : 0);
    ssize_t sent;

    if (unsent_count == 0)
        return;
    message.msg_iovlen = gather(parts, now_ns());
    sent = sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent < 0) {
        if (errno != EAGAIN)
            die("the server hung up");
        return;
    }
    first_sent += (size_t)sent;
    while (unsent_count > 0 && first_sent >= whole) {
        first_sent -= whole;
        unsent_first = (unsent_first + 1) % DEPTH_MAX;
        unsent_count--;
    }
}

static void count_latency(uint64_t took_ns)
{
    unsigned exponent = took_ns < SUB_BUCKETS ? 0 : 63 - (unsigned)__builtin_clzll(took_ns);
    unsigned sub = took_ns < SUB_BUCKETS ? (unsigned)took_ns
                                         : (unsigned)(took_ns >> (exponent - 4)) % SUB_BUCKETS;

    histogram[exponent * SUB_BUCKETS + sub]++;
    latency_sum_ns += took_ns;
    requests++;
}

/* A request is over: begins the slot's next one if `go_on`. */
static void end(uint64_t cookie, uint64_t time_ns, int go_on)
{
    struct slot *slot = &slots[cookie % DEPTH_MAX];

    count_latency(time_ns - slot->started_ns);
    slot->cookie = 0;
    in_flight--;
    if (go_on)
        begin((uint32_t)(cookie & 0xffff));
}

/* The header of a reply or a chunk, if it is all there: checks it, and says what has to be skipped
 * behind it. Returns its length, or 0. */
static size_t take_header(const char *header, size_t available, uint64_t time_ns, int go_on)
{
    uint32_t magic;
    size_t length;
    uint64_t cookie;
    int done = 1;

    if (available < REPLY_BYTES)
        return 0;
    magic = get32(header);
    if (magic == REPLY_MAGIC && style != EXTENDED) {
        length = REPLY_BYTES;
        if (get32(header + 4) != 0)
            die("a request failed");
        skip = is_write ? 0 : block_bytes;
    } else if (magic == STRUCTURED_REPLY_MAGIC && style == STRUCTURED) {
        length = STRUCTURED_BYTES;
    } else if (magic == EXTENDED_REPLY_MAGIC && style == EXTENDED) {
        length = EXTENDED_BYTES;
    } else {
        die("bad reply magic");
        return 0;
    }
    if (available < length)
        return 0;
    if (length != REPLY_BYTES) {
        done = get16(header + 4) & CHUNK_DONE;
        if (get16(header + 6) & CHUNK_ERRORS)
            die("a request failed");
        skip = length == STRUCTURED_BYTES ? get32(header + 16) : get64(header + 24);
    }
    cookie = get64(header + 8);
    if (cookie == 0 || (cookie & 0xffff) >= depth || slots[cookie % DEPTH_MAX].cookie != cookie)
        die("a reply to a request that isn't in flight");
    if (done)
        end(cookie, time_ns, go_on);
    return length;
}

/* Takes what has arrived. 0 when there was nothing. */
static int receive(uint64_t until_ns)
{
    ssize_t count = recv(fd, input + input_filled, INPUT_BYTES - input_filled, MSG_DONTWAIT);
    uint64_t time_ns;
    size_t at = 0;

    if (count < 0 && errno == EAGAIN)
        return 0;
    if (count <= 0)
        die("the server hung up");
    input_filled += (size_t)count;
    time_ns = now_ns();
    for (;;) {
        size_t part = skip < input_filled - at ? skip : input_filled - at, length;

        at += part;
        skip -= part;
        if (skip > 0)
            break;
        length = take_header(input + at, input_filled - at, time_ns, time_ns < until_ns);
        if (length == 0)
            break;
        at += length;
    }
    input_filled -= at;
    memmove(input, input + at, input_filled);
    return 1;
}

static void load(uint64_t until_ns)
{
    for (uint32_t i = 0; i < depth; i++)
        begin(i);
    while (in_flight > 0) {
        send_due();
        if (!receive(until_ns)) {
            struct pollfd wait = {.fd = fd, .events = POLLIN};

            if (unsent_count > 0)
                wait.events |= POLLOUT;
            poll(&wait, 1, -1);
        }
    }
}

/* --- after it --- */

static double quantile_ns(double share)
{
    uint64_t rank = (uint64_t)(share * (double)requests), before = 0;

    for (unsigned i = 0; i < BUCKETS; i++) {
        before += histogram[i];
        if (before > rank) {
            unsigned exponent = i / SUB_BUCKETS, sub = i % SUB_BUCKETS;

            if (exponent < 4)
                return sub;
            return (double)((SUB_BUCKETS + sub + 0.5) * (double)(1ULL << (exponent - 4)));
        }
    }
    return 0;
}

static double seconds(struct timeval time)
{
    return (double)time.tv_sec + (double)time.tv_usec / 1e6;
}

static void report(double took_s)
{
    const char *half = is_write ? "write" : "read", *other = is_write ? "read" : "write";
    struct rusage usage;

    getrusage(RUSAGE_SELF, &usage);
    printf("{\"jobs\": [{\"%s\": {\"total_ios\": 0}, \"%s\": {\"total_ios\": %llu, \"iops\": %.1f, "
           "\"bw_bytes\": %.0f, \"lat_ns\": {\"mean\": %.0f, \"percentile\": "
           "{\"50.000000\": %.0f, \"99.000000\": %.0f}}}, \"usr_cpu\": %.2f, \"sys_cpu\": %.2f, "
           "\"job_runtime\": %.0f}]}\n",
           other, half, (unsigned long long)requests, (double)requests / took_s,
           (double)requests * block_bytes / took_s,
           (double)latency_sum_ns / (double)(requests ? requests : 1), quantile_ns(0.5),
           quantile_ns(0.99), 100 * seconds(usage.ru_utime) / took_s,
           100 * seconds(usage.ru_stime) / took_s, took_s * 1000);
}

int main(int argc, char **argv)
{
    const char *wanted = argc == 8 ? argv[7] : "simple";
    char bye[EXTENDED_BYTES] = {0};
    uint64_t start_ns, size;

    if (argc != 7 && argc != 8)
        die("usage: lean_client SOCKET EXPORT read|write BLOCK_BYTES DEPTH MILLISECONDS [STYLE]");
    if (strcmp(wanted, "extended") == 0)
        style = EXTENDED;
    else if (strcmp(wanted, "structured") == 0)
        style = STRUCTURED;
    else if (strcmp(wanted, "simple") != 0)
        die("a style is simple, structured or extended");
    header_bytes = style == EXTENDED ? EXTENDED_BYTES : REQUEST_BYTES;
    is_write = strcmp(argv[3], "write") == 0;
    block_bytes = (uint32_t)strtoul(argv[4], NULL, 10);
    depth = (uint32_t)strtoul(argv[5], NULL, 10);
    if (block_bytes == 0 || block_bytes > BLOCK_MAX || depth == 0 || depth > DEPTH_MAX)
        die("block size or depth out of bounds");
    for (size_t i = 0; i < sizeof payload; i++)
        payload[i] = (char)(i * 167 >> 3);
    dial(argv[1]); /* twice, as fio does: once to ask for the size (decoy.py counts on it) */
    negotiate(argv[2]);
    close(fd);
    dial(argv[1]);
    size = negotiate(argv[2]);
    blocks = size / block_bytes;
    if (blocks == 0)
        die("the disk is smaller than a block");
    start_ns = now_ns();
    load(start_ns + strtoull(argv[6], NULL, 10) * 1000000);
    report((double)(now_ns() - start_ns) / 1e9);
    put_header(bye, CMD_DISC, 0, 0, 0);
    send_all(bye, header_bytes);
    close(fd);
    return 0;
}
