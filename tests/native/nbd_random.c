/* SPDX-License-Identifier: Apache-2.0
 *
 * Inputs for LLVMFuzzerTestOneInput where there is no libFuzzer: drawn from a seed, shaped like
 * what clients do. An input depends on its number and the seed alone.
 *
 * `nbd_random SEED FIRST COUNT SECONDS` runs inputs FIRST, FIRST + 1 and so on, until COUNT or
 * SECONDS are over. `nbd_random -w FOLDER SEED FIRST COUNT` writes them to files instead, as a
 * corpus. `nbd_random FILE...` runs files. */

#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "nbd_input.h"

enum { INPUT_BYTES_MAX = 2048, FILE_BYTES_MAX = 1 << 20 };

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t length);

static uint64_t seed, number;
static uint8_t bytes[FILE_BYTES_MAX];
static size_t length;

/* --- numbers: SplitMix64, so that neighbouring seeds have nothing in common --- */

static uint64_t state;

static uint64_t draw(void)
{
    uint64_t mixed = state += UINT64_C(0x9E3779B97F4A7C15);

    mixed = (mixed ^ mixed >> 30) * UINT64_C(0xBF58476D1CE4E5B9);
    mixed = (mixed ^ mixed >> 27) * UINT64_C(0x94D049BB133111EB);
    return mixed ^ mixed >> 31;
}

static unsigned below(unsigned bound)
{
    return (unsigned)(draw() % bound);
}

static void put(unsigned byte)
{
    if (length < INPUT_BYTES_MAX)
        bytes[length++] = (uint8_t)byte;
}

/* --- inputs --- */

static void put_operation(unsigned operation, unsigned arguments, unsigned client)
{
    put(operation | client);
    while (arguments-- > 0)
        put(below(256));
}

/* A client sends some requests, mostly plain ones, and hears what comes. */
static void put_burst(unsigned client)
{
    unsigned count = 1 + below(below(8) == 0 ? 40 : 8);

    while (count-- > 0) {
        put(OP_REQUEST | client);
        put(below(3) ? below(10) : below(256)); /* READ or WRITE without flags; anything */
        put(below(4) ? below(16) : below(256)); /* near each other; anywhere */
        put(below(256));
    }
    if (below(3))
        put_operation(OP_WRITE_ALL, 0, client);
    else
        put_operation(OP_WRITE, 1, client);
    if (below(4))
        put_operation(OP_PASS, 0, 0);
    if (below(3) == 0)
        put_operation(OP_FINISH_ALL, 0, client);
    if (below(3) == 0)
        put_operation(OP_READ, 1, client);
    else if (below(2))
        put_operation(OP_READ_ALL, 0, client);
}

/* Half of a payload that is received into its own buffer, or dropped, and then something else. */
static void put_half(unsigned client)
{
    static const uint8_t others[] = {RARE_STOP, RARE_CLOSE, RARE_LEAVE, RARE_SHUT};

    put(OP_REQUEST | client);
    put(5 + below(5)); /* WRITE */
    put(below(64));
    put(10 + below(5)); /* from 64 KiB */
    put(OP_WRITE | client);
    put(0xb0 | below(64));
    put_operation(OP_PASS, 0, 0);
    if (below(2) == 0)
        put_operation(OP_PASS, 0, 0);
    if (below(3) == 0) {
        put(OP_RARE | client);
        put(others[below(sizeof others)]);
    }
}

/* Python's life, and the host's, go on meanwhile. */
static void put_other(unsigned client)
{
    static const uint8_t operations[] = {
        OP_PASS,     OP_PASS,     OP_PASS,       OP_READ,       OP_READ_ALL,   OP_WRITE,
        OP_FINISH,   OP_FINISH,   OP_FINISH_ALL, OP_QUIET,      OP_SILENCE,    OP_PUBLISH,
        OP_WITHDRAW, OP_HOLD,     OP_SET_MAP,    OP_HOLD_IO,    OP_RELEASE_IO, OP_RELEASE_IO,
        OP_TROUBLE,  OP_TROUBLE,  OP_WAIT_IDLE,  OP_WRITE_ALL,  OP_RARE,
        OP_SLEEP,
    };
    static const uint8_t arguments[OP_COUNT] = {
        [OP_WRITE] = 1,    [OP_READ] = 1,    [OP_FINISH] = 2,     [OP_PUBLISH] = 2,
        [OP_WITHDRAW] = 2, [OP_SET_MAP] = 1, [OP_RELEASE_IO] = 1, [OP_TROUBLE] = 1,
        [OP_RARE] = 1,
    };
    unsigned operation = operations[below(sizeof operations)];

    put_operation(operation, arguments[operation], client);
}

static void make_input(void)
{
    unsigned turns, plain;

    state = seed ^ number * UINT64_C(0xD1342543DE82EF95);
    turns = 1 + below(24);
    plain = 1 + below(4);
    length = 0;
    put(below(256) & (below(2) ? ~(SET_HELD | SET_READ_ONLY | SET_NO_MAP) : 0xff));
    put(below(256));
    put(below(4) ? (below(256) & ~3u) | 1 : below(256));
    put(below(256));
    while (turns-- > 0) {
        unsigned client = below(2) ? OP_CLIENT : 0;

        if (below(plain + 1))
            put_burst(client);
        else if (below(6) == 0)
            put_half(client);
        else if (below(30) == 0)
            put_operation(below(2) ? OP_RAW : OP_DAMAGED, below(40), client);
        else
            put_other(client);
    }
}

/* --- running them --- */

/* So that whoever finds something says it by SIGABRT. */
const char *__asan_default_options(void);
const char *__ubsan_default_options(void);

const char *__asan_default_options(void)
{
    return "abort_on_error=1";
}

const char *__ubsan_default_options(void)
{
    return "abort_on_error=1";
}

static void say_where(int signal_number)
{
    char line[128];
    int count = snprintf(line, sizeof line, "nbd_random: seed %llu, input %llu\n",
                         (unsigned long long)seed, (unsigned long long)number);

    (void)!write(STDERR_FILENO, line, (size_t)count);
    signal(signal_number, SIG_DFL);
    raise(signal_number);
}

static int run_inputs(uint64_t count, long seconds)
{
    time_t begin = time(NULL);
    uint64_t first = number;

    for (; number - first < count && time(NULL) - begin < seconds; number++) {
        make_input();
        LLVMFuzzerTestOneInput(bytes, length);
    }
    printf("%llu inputs in %ld s\n", (unsigned long long)(number - first),
           (long)(time(NULL) - begin));
    return 0;
}

static int write_inputs(const char *folder, uint64_t count)
{
    for (uint64_t last = number + count; number < last; number++) {
        char path[4096];
        FILE *file;

        snprintf(path, sizeof path, "%s/seed-%llu", folder, (unsigned long long)number);
        make_input();
        file = fopen(path, "wb");
        if (file == NULL || fwrite(bytes, 1, length, file) != length || fclose(file) != 0) {
            perror(path);
            return 1;
        }
    }
    return 0;
}

static int run_file(const char *path)
{
    FILE *file = fopen(path, "rb");

    if (file == NULL) {
        perror(path);
        return 1;
    }
    length = fread(bytes, 1, sizeof bytes, file);
    fclose(file);
    LLVMFuzzerTestOneInput(bytes, length);
    return 0;
}

int main(int argc, char **argv)
{
    int writes = argc == 6 && strcmp(argv[1], "-w") == 0;
    int failed = 0;

    if (!writes && (argc != 5 || argv[1][0] < '0' || argv[1][0] > '9')) {
        for (int i = 1; i < argc; i++)
            failed |= run_file(argv[i]);
        return failed;
    }
    seed = strtoull(argv[writes ? 3 : 1], NULL, 10);
    number = strtoull(argv[writes ? 4 : 2], NULL, 10);
    if (writes)
        return write_inputs(argv[2], strtoull(argv[5], NULL, 10));
    signal(SIGABRT, say_where);
    return run_inputs(strtoull(argv[3], NULL, 10), strtol(argv[4], NULL, 10));
}
