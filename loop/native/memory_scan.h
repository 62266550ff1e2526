/* SPDX-License-Identifier: Apache-2.0
 *
 * Questions about the content of memory that Python would answer a byte at a time. Read by the C
 * compiler and by cffi, so plain declarations only. No state; any thread. */

/* The memory is looked at in blocks: one of `head` bytes (may be 0), then `granule` bytes each, the
 * last one shorter where it has to be. Answers how many bytes the leading blocks have together that
 * are alike: positive, when each holds something else than zero bytes; negative, when all of them
 * are zero bytes. `length` and `granule` aren't 0. */
int64_t memory_run(const void *memory, uint64_t length, uint64_t head, uint64_t granule);

/* How many leading bytes are the same in both. */
uint64_t memory_equal_length(const void *one, const void *other, uint64_t length);
