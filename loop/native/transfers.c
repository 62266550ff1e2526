/* SPDX-License-Identifier: Apache-2.0
 *
 * The calls of transfers.h. No Python in here; cffi lets go of the GIL around the whole batch. */

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <unistd.h>

static int64_t transfer_one(const struct transfer *request)
{
    uint64_t moved = (uint64_t)request->moved;

    while (moved < request->length) {
        char *memory = (char *)(uintptr_t)request->address + moved;
        uint64_t length = request->length - moved;
        int64_t offset = request->offset + (int64_t)moved;
        ssize_t count = request->is_write ? pwrite(request->fd, memory, length, offset)
                                          : pread(request->fd, memory, length, offset);

        if (count > 0)
            moved += (uint64_t)count;
        else if (count == 0)
            /* The end of the file. For a write POSIX leaves it open; going on could be for ever. */
            return request->is_write ? -EIO : (int64_t)moved;
        else if (errno != EINTR)
            return -errno;
    }
    return (int64_t)moved;
}

/* Has the disk begin with a read while an earlier one is waited for. Only a hint. */
static void announce(const struct transfer *request)
{
    int64_t left = (int64_t)request->length - request->moved;

    if (!request->is_write && left > 0) /* 0 would mean up to the end of the file */
        posix_fadvise(request->fd, request->offset + request->moved, left, POSIX_FADV_WILLNEED);
}

void transfer_all(struct transfer *transfers, uint32_t count)
{
    uint32_t i;

    for (i = 1; i < count; i++)
        announce(&transfers[i]);
    for (i = 0; i < count; i++)
        transfers[i].moved = transfer_one(&transfers[i]);
}
