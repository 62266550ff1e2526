/* SPDX-License-Identifier: Apache-2.0
 *
 * The functions of memory_scan.h. No Python in here; cffi lets go of the GIL around each call. */

#include <stdint.h>
#include <string.h>

enum {
    SCAN_WORDS = 16,  /* looked at before each decision: two cache lines */
    COMPARE_BYTES = 4096
};

static int is_zero(const unsigned char *memory, uint64_t length)
{
    uint64_t words[SCAN_WORDS];
    uint64_t any;
    unsigned i;

    for (; length >= sizeof(words); length -= sizeof(words), memory += sizeof(words)) {
        memcpy(words, memory, sizeof(words));
        any = 0;
        for (i = 0; i < SCAN_WORDS; i++)
            any |= words[i];
        if (any)
            return 0;
    }
    any = 0;
    for (; length; length--, memory++)
        any |= *memory;
    return !any;
}

int64_t memory_run(const void *memory, uint64_t length, uint64_t head, uint64_t granule)
{
    const unsigned char *bytes = memory;
    uint64_t block = head ? head : granule;
    uint64_t done;
    int zero;

    if (block > length)
        block = length;
    zero = is_zero(bytes, block);
    for (done = block; done < length; done += block) {
        block = granule < length - done ? granule : length - done;
        if (is_zero(bytes + done, block) != zero)
            break;
    }
    return zero ? -(int64_t)done : (int64_t)done;
}

uint64_t memory_equal_length(const void *one, const void *other, uint64_t length)
{
    const unsigned char *a = one, *b = other;
    uint64_t done = 0;

    while (length - done >= COMPARE_BYTES && !memcmp(a + done, b + done, COMPARE_BYTES))
        done += COMPARE_BYTES;
    while (done < length && a[done] == b[done])
        done++;
    return done;
}
