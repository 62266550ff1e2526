/* SPDX-License-Identifier: Apache-2.0
 *
 * A batch of Linux AIO requests: what Python stages, what the kernel gets in one io_submit, what
 * comes back in one reap. Read by the C compiler and by cffi, so plain declarations only.
 *
 * Context: one thread at a time per queue (the home thread of the AioContext that owns it).
 * Errors: every int result below is -errno where it is negative. */

/* One staged request. Python writes it with struct.pack_into, which costs a third of a call into C
 * and doesn't let go of the GIL. Native byte order and alignment: "@QQqiiiI". */
struct aio_request {
    uint64_t address;   /* of the memory to read into or write from */
    uint64_t length;    /* bytes */
    int64_t offset;     /* in the file */
    int32_t fd;
    int32_t rw_flags;   /* RWF_* */
    int32_t opcode;     /* IO_CMD_PREAD or IO_CMD_PWRITE */
    uint32_t slot;      /* which of the owner's `depth` slots it is; comes back with the result */
};

struct aio_queue {
    uint32_t depth;             /* slots; no more requests than this are staged or in the kernel */
    uint32_t staged_count;      /* entries of `staged` that io_submit has not taken yet */
    uint32_t in_kernel;         /* taken by io_submit, not reaped */
    uint32_t refused_count;     /* io_submit's errors, reported by the next reap */
    int32_t eventfd;            /* the kernel adds 1 to it at each completion */
    int32_t reads_ring;         /* 1: completions are read in user space; 0: by io_getevents */
    struct aio_request *staged; /* [depth] */
    int64_t *finished_slots;    /* [depth], filled by a reap */
    int64_t *finished_results;  /* [depth], bytes or -errno */
    int64_t *refused_slots;     /* [depth] */
    int64_t *refused_results;   /* [depth] */
    void *context;              /* io_context_t: the address of the kernel's completion ring */
    void *iocbs;                /* struct iocb [depth], by slot */
    void *iocb_pointers;        /* struct iocb *[depth] */
    void *events;               /* struct io_event [depth], for io_getevents */
};

/* Sets up a queue. `want_ring` 0 forbids reading the completion ring in user space. On success
 * *queue is to be closed by aio_queue_close. */
int aio_queue_open(struct aio_queue **queue, uint32_t depth, int eventfd, int want_ring);

/* Gives everything back. Waits in the kernel for what is still in flight. */
void aio_queue_close(struct aio_queue *queue);

/* Hands all staged requests to the kernel, in one io_submit unless one of them is refused: that one
 * is finished with its errno, and the rest goes on. What the kernel has no room for (EAGAIN) stays
 * staged, in order. Then reaps what has finished already. Returns the number of finished entries. */
int aio_queue_submit(struct aio_queue *queue);

/* Moves what has finished into finished_slots and finished_results; never blocks. Returns how many,
 * at most `depth`. */
int aio_queue_reap(struct aio_queue *queue);

/* fallocate(2), tried again on EINTR. 0 or -errno. */
int file_allocate(int fd, int mode, int64_t offset, int64_t length);

/* statfs(2)'s f_type, which names the filesystem. */
int64_t file_system_magic(int fd);

/* What statx(2) says of direct I/O on this file. 0 and both alignments, -EOPNOTSUPP where the file
 * takes none, -ENOSYS where the kernel or the filesystem doesn't say. */
int file_direct_alignment(int fd, uint32_t *memory_alignment, uint32_t *offset_alignment);
