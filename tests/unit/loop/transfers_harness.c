/* SPDX-License-Identifier: Apache-2.0
 *
 * transfers.c over calls that come short, are interrupted and fail. Run by test_aio_queue.py. */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "transfers.h"

static int calls;
static ssize_t fake(int fd, const void *memory, size_t length, off_t offset);
#define pread(fd, memory, length, offset) fake(fd, memory, length, offset)
#define pwrite(fd, memory, length, offset) fake(fd, memory, length, offset)
#include "transfers.c"

#define CHECK(what) \
    do { \
        if (!(what)) { \
            fprintf(stderr, "line %d: %s\n", __LINE__, #what); \
            exit(1); \
        } \
    } while (0)

/* Descriptor 1 moves 10 bytes a call and is interrupted in between; 2 fails at offset 20 and
 * behind; 3 moves nothing from offset 30 on. */
static ssize_t fake(int fd, const void *memory, size_t length, off_t offset)
{
    CHECK((uintptr_t)memory == (uintptr_t)(1000 + offset));
    if (fd == 1 && calls++ % 2 == 0) {
        errno = EINTR;
        return -1;
    }
    if (fd == 2 && offset >= 20) {
        errno = ENOSPC;
        return -1;
    }
    if (fd == 3 && offset >= 30)
        return 0;
    return length < 10 ? (ssize_t)length : 10;
}

int main(void)
{
    struct transfer batch[] = {
        {1000, 35, 0, 0, 1, 1}, /* short and interrupted */
        {1000, 35, 0, 0, 2, 1}, /* fails after 20 bytes */
        {1000, 35, 0, 0, 3, 0}, /* a read that meets the end of the file */
        {1000, 35, 0, 0, 3, 1}, /* a write that makes no progress */
        {1000, 35, 0, 25, 1, 0}, /* goes on where it was */
        {1000, 0, 0, 0, 1, 0},
    };

    transfer_all(batch, 6);
    CHECK(batch[0].moved == 35);
    CHECK(batch[1].moved == -ENOSPC);
    CHECK(batch[2].moved == 30);
    CHECK(batch[3].moved == -EIO);
    CHECK(batch[4].moved == 35);
    CHECK(batch[5].moved == 0);
    CHECK(calls == 10);
    return 0;
}
