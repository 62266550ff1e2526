/* SPDX-License-Identifier: Apache-2.0
 *
 * The direct map as C code asks it: guest page -> host offset. The Python side (direct_map.py)
 * decides what stands in it; this only answers, and knows which native requests are under way by
 * which of its answers.
 *
 * There are two places to find a page. One is a table of pages that were entered one by one. The
 * other, for reads alone, are slices of an image's own tables, as they lie in Python's cache of
 * them: Python shows where one is, and hides it before it moves or says something else.
 *
 * Read by the C compiler and by cffi, so plain declarations only. Context: one thread at a time per
 * map, the home thread of the node's AioContext. */

/* How the host file is read and written (file_engine.py, NativeIo). */
enum map_io {
    MAP_IO_INLINE = 1, /* on the spot: a memory filesystem, which never waits */
    MAP_IO_NOWAIT = 2, /* reads on the spot by RWF_NOWAIT, the rest is Python's: the page cache */
    MAP_IO_AIO = 3,    /* Linux AIO: O_DIRECT */
};

/* A native request's place in the order of those under way; embedded in the request. */
struct map_pin {
    struct map_pin *next;
    struct map_pin *previous;
    uint64_t serial;
};

/* key is UINT64_MAX where there is none. Of a page: host offset << 1 | writable. Of a slice, by its
 * number: the address of its words | whether one was used. */
struct map_entry {
    uint64_t key;
    uint64_t value;
};

struct map_table {
    uint64_t count;          /* of entries */
    uint64_t capacity;       /* a power of two */
    struct map_entry *entries;
};

struct direct_map {
    int32_t fd;
    int32_t io;              /* enum map_io */
    int32_t held;            /* every look-up misses */
    int32_t durable;         /* data is all there is: FUA and FLUSH need nothing but the file's */
    uint32_t page_bits;
    uint32_t alignment_mask; /* offsets, lengths */
    uint64_t memory_mask;    /* alignment of memory - 1 */
    uint64_t length;         /* mapped bytes, from 0 */
    struct map_table pages;
    struct map_table slices;
    uint32_t slice_bits;     /* words of a slice, one for each page */
    uint64_t word_mask;      /* the bits of a word that are the host offset */
    uint64_t word_plain;     /* the bits that say nothing else; one besides these two: a miss */
    uint64_t host_end;       /* of what words may lead to */

    struct map_pin pins;     /* the head of the ring of requests under way, oldest first */
    uint64_t serial;         /* of the newest pin; serials begin at 1 */
    uint64_t watched;        /* Python waits for this one and all before it; 0: it doesn't */
    uint64_t token;          /* of the event that tells Python */
};

/* Makes an empty map of a file. NULL when there is no memory. */
struct direct_map *direct_map_open(int32_t fd, int32_t io, uint32_t page_bits, uint64_t length,
                                   uint32_t request_alignment, uint32_t memory_alignment,
                                   int32_t durable);

/* No request may be under way by it. */
void direct_map_close(struct direct_map *map);

/* Enters a page, or overwrites it. -ENOMEM when there is no room for it: it stays a miss. */
int direct_map_publish(struct direct_map *map, uint64_t page, uint64_t value);

/* Takes pages first to last (included) out, and hides the slices that have words of them. */
void direct_map_withdraw(struct direct_map *map, uint64_t first, uint64_t last);

/* Takes all pages out, and gives their memory back. Slices stay. */
void direct_map_clear(struct direct_map *map);

/* How the words of slices are read, before the first is shown. */
void direct_map_set_words(struct direct_map *map, uint32_t slice_bits, uint64_t word_mask,
                          uint64_t word_plain);

/* The words of slice `number`, pages number << slice_bits and on, are at `address`, which is a
 * multiple of 8. They may change; they stay until they are hidden. host_end grows only. */
int direct_map_show(struct direct_map *map, uint64_t number, uint64_t address, uint64_t host_end);

/* The slice isn't to be read any more, if what is shown of it is at `address`. */
void direct_map_hide(struct direct_map *map, uint64_t number, uint64_t address);

/* No slice is to be read any more. */
void direct_map_hide_all(struct direct_map *map);

/* Whether the slice at `address` was of use since this was last asked. */
int32_t direct_map_was_used(struct direct_map *map, uint64_t number, uint64_t address);

/* The host offset of guest bytes [offset, offset + length), or -1 to ask Python. length > 0. The
 * answer holds until the caller returns to the poll; to use it longer, pin. */
int64_t direct_map_find(struct direct_map *map, uint64_t offset, uint64_t length,
                        int32_t writable);

/* A request taken from the map is under way. */
void direct_map_pin(struct direct_map *map, struct map_pin *pin);

/* It is done. Returns 1 when Python waits for just that (`watched` is 0 again): post MAP_IDLE. */
int direct_map_unpin(struct direct_map *map, struct map_pin *pin);

/* The serial of the oldest request under way, UINT64_MAX when there is none. */
uint64_t direct_map_oldest(const struct direct_map *map);
