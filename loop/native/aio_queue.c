/* SPDX-License-Identifier: Apache-2.0
 *
 * The batch of aio_queue.h over libaio. No Python in here; cffi lets go of the GIL around each call.
 *
 * The completion ring. io_setup maps a ring of events into this process; io_context_t is its
 * address, and io_getevents with a zero timeout is nothing but a copy out of it (libaio itself
 * peeks at head and tail to answer "empty"). The kernel's aio_ring has had this shape since 2.6 and
 * says so by its magic and its incompat_features; where they are as expected, the copy is made
 * here, without a system call. The kernel writes `tail` after the events (a release), we write
 * `head` after having read them. */

#include <errno.h>
#include <fcntl.h>
#include <libaio.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <unistd.h>

#define RING_MAGIC 0xa10a10a1u
#define IOCB_HAS_EVENTFD 1u /* IOCB_FLAG_RESFD of <linux/aio_abi.h>, which clashes with libaio.h */

struct ring_header {
    uint32_t id;
    uint32_t entries;
    uint32_t head; /* ours */
    uint32_t tail; /* the kernel's */
    uint32_t magic;
    uint32_t compat_features;
    uint32_t incompat_features;
    uint32_t header_length;
};

int aio_queue_open(struct aio_queue **result, uint32_t depth, int eventfd, int want_ring)
{
    struct aio_queue *queue = calloc(1, sizeof *queue);
    io_context_t context = NULL;
    const struct ring_header *ring;
    int error;

    *result = NULL;
    if (queue == NULL)
        return -ENOMEM;
    queue->depth = depth;
    queue->eventfd = eventfd;
    queue->staged = calloc(depth, sizeof *queue->staged);
    queue->finished_slots = calloc(depth, sizeof *queue->finished_slots);
    queue->finished_results = calloc(depth, sizeof *queue->finished_results);
    queue->refused_slots = calloc(depth, sizeof *queue->refused_slots);
    queue->refused_results = calloc(depth, sizeof *queue->refused_results);
    queue->iocbs = calloc(depth, sizeof(struct iocb));
    queue->iocb_pointers = calloc(depth, sizeof(struct iocb *));
    queue->events = calloc(depth, sizeof(struct io_event));
    if (!queue->staged || !queue->finished_slots || !queue->finished_results ||
        !queue->refused_slots || !queue->refused_results || !queue->iocbs ||
        !queue->iocb_pointers || !queue->events)
        error = -ENOMEM;
    else
        error = io_setup((int)depth, &context);
    if (error != 0) {
        aio_queue_close(queue);
        return error;
    }
    queue->context = context;
    ring = (const struct ring_header *)context;
    queue->reads_ring = want_ring && ring->magic == RING_MAGIC && ring->incompat_features == 0 &&
                        ring->header_length == sizeof *ring;
    *result = queue;
    return 0;
}

void aio_queue_close(struct aio_queue *queue)
{
    if (queue->context != NULL)
        io_destroy((io_context_t)queue->context);
    free(queue->staged);
    free(queue->finished_slots);
    free(queue->finished_results);
    free(queue->refused_slots);
    free(queue->refused_results);
    free(queue->iocbs);
    free(queue->iocb_pointers);
    free(queue->events);
    free(queue);
}

/* Fills the iocb of one staged request. */
static struct iocb *prepare(struct aio_queue *queue, const struct aio_request *request)
{
    struct iocb *iocb = (struct iocb *)queue->iocbs + request->slot;

    memset(iocb, 0, sizeof *iocb);
    iocb->data = (void *)(uintptr_t)request->slot;
    iocb->aio_lio_opcode = (short)request->opcode;
    iocb->aio_fildes = request->fd;
    iocb->aio_rw_flags = (unsigned)request->rw_flags;
    iocb->u.c.buf = (void *)(uintptr_t)request->address;
    iocb->u.c.nbytes = request->length;
    iocb->u.c.offset = request->offset;
    iocb->u.c.flags = IOCB_HAS_EVENTFD;
    iocb->u.c.resfd = (unsigned)queue->eventfd;
    return iocb;
}

int aio_queue_submit(struct aio_queue *queue)
{
    struct iocb **pointers = queue->iocb_pointers;
    uint32_t taken = 0;
    uint32_t i;

    for (i = 0; i < queue->staged_count; i++)
        pointers[i] = prepare(queue, &queue->staged[i]);
    while (taken < queue->staged_count) {
        int count = io_submit((io_context_t)queue->context, (long)(queue->staged_count - taken),
                              pointers + taken);
        if (count > 0) {
            taken += (uint32_t)count;
            queue->in_kernel += (uint32_t)count;
        } else if (count == -EAGAIN || count == 0) {
            break;
        } else if (count != -EINTR) {
            /* The first of the rest is at fault; slots bound the refused ones. */
            queue->refused_slots[queue->refused_count] = queue->staged[taken].slot;
            queue->refused_results[queue->refused_count++] = count;
            taken++;
        }
    }
    queue->staged_count -= taken;
    memmove(queue->staged, queue->staged + taken, queue->staged_count * sizeof *queue->staged);
    return aio_queue_reap(queue);
}

/* Reports one completion as entry `index`. */
static void finish(struct aio_queue *queue, uint32_t index, const struct io_event *event)
{
    queue->finished_slots[index] = (int64_t)(uintptr_t)event->data;
    queue->finished_results[index] = (int64_t)(long)event->res;
}

static uint32_t reap_ring(struct aio_queue *queue, uint32_t count)
{
    struct ring_header *ring = queue->context;
    const struct io_event *events = (const struct io_event *)(ring + 1);
    uint32_t head = ring->head; /* only this thread writes it */
    uint32_t tail = __atomic_load_n(&ring->tail, __ATOMIC_ACQUIRE);

    while (head != tail && count < queue->depth) {
        finish(queue, count++, &events[head]);
        head = head + 1 == ring->entries ? 0 : head + 1;
    }
    __atomic_store_n(&ring->head, head, __ATOMIC_RELEASE);
    return count;
}

static uint32_t reap_by_call(struct aio_queue *queue, uint32_t count)
{
    struct timespec no_wait = {0, 0};
    struct io_event *events = queue->events;
    int found = io_getevents((io_context_t)queue->context, 0, (long)(queue->depth - count), events,
                             &no_wait);
    int i;

    for (i = 0; i < found; i++)
        finish(queue, count++, &events[i]);
    return count;
}

int aio_queue_reap(struct aio_queue *queue)
{
    uint32_t refused = queue->refused_count;
    uint32_t count = refused;

    if (refused > 0) {
        memcpy(queue->finished_slots, queue->refused_slots, refused * sizeof(int64_t));
        memcpy(queue->finished_results, queue->refused_results, refused * sizeof(int64_t));
        queue->refused_count = 0;
    }
    if (queue->in_kernel > 0 && count < queue->depth)
        count = queue->reads_ring ? reap_ring(queue, count) : reap_by_call(queue, count);
    queue->in_kernel -= count - refused;
    return (int)count;
}

int file_allocate(int fd, int mode, int64_t offset, int64_t length)
{
    int result;

    do
        result = fallocate(fd, mode, offset, length);
    while (result != 0 && errno == EINTR);
    return result == 0 ? 0 : -errno;
}

int64_t file_system_magic(int fd)
{
    struct statfs about;

    return fstatfs(fd, &about) == 0 ? (int64_t)(uint32_t)about.f_type : -(int64_t)errno;
}

/* The call and the layout are spelled out because the headers of a build machine may be older than
 * the kernel underneath (struct statx is 256 bytes for good; the two fields came with Linux 6.1). */
int file_direct_alignment(int fd, uint32_t *memory_alignment, uint32_t *offset_alignment)
{
#ifdef SYS_statx
    enum { EMPTY_PATH = 0x1000, DIRECT_IO_ALIGNMENT = 0x2000, MEMORY_AT = 152, OFFSET_AT = 156 };
    union {
        uint32_t mask;
        char bytes[256];
    } about;

    memset(&about, 0, sizeof about);
    if (syscall(SYS_statx, fd, "", EMPTY_PATH, DIRECT_IO_ALIGNMENT, &about) != 0)
        return -errno;
    if (!(about.mask & DIRECT_IO_ALIGNMENT))
        return -ENOSYS;
    memcpy(memory_alignment, about.bytes + MEMORY_AT, sizeof *memory_alignment);
    memcpy(offset_alignment, about.bytes + OFFSET_AT, sizeof *offset_alignment);
    return *offset_alignment == 0 ? -EOPNOTSUPP : 0;
#else
    (void)fd, (void)memory_alignment, (void)offset_alignment;
    return -ENOSYS;
#endif
}
