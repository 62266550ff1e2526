/* SPDX-License-Identifier: Apache-2.0
 *
 * drivers/native/direct_map.c against a plain array, and at the edges of its integers. */

#include <stdint.h>

#include "direct_map.h"

#include "direct_map.c"

#include <stdio.h>

#define CHECK(condition)                                                                    \
    do {                                                                                    \
        if (!(condition)) {                                                                 \
            fprintf(stderr, "line %d: %s\n", __LINE__, #condition);                          \
            exit(1);                                                                        \
        }                                                                                   \
    } while (0)

enum { PAGES = 3000, BITS = 12, ROUNDS = 200000 };

static uint64_t random_state = 88172645463325252u;

static uint64_t random_below(uint64_t bound)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state % bound;
}

static uint64_t model[PAGES]; /* host page << 1 | writable, + 1; 0 for none */

static int64_t model_find(uint64_t first, uint64_t count, int writable)
{
    for (uint64_t i = 0; i < count; i++) {
        uint64_t value = model[first + i] - 1;

        if (model[first + i] == 0 || (writable && !(value & 1)) ||
            value >> 1 != ((model[first] - 1) >> 1) + i)
            return -1;
    }
    return (int64_t)(((model[first] - 1) >> 1) << BITS);
}

static void test_random_changes(void)
{
    struct direct_map *map =
        direct_map_open(3, MAP_IO_INLINE, BITS, (uint64_t)PAGES << BITS, 512, 512, 1);

    CHECK(map != NULL);
    for (int round = 0; round < ROUNDS; round++) {
        uint64_t page = random_below(PAGES);
        uint64_t last = page + random_below(random_below(50) == 0 ? PAGES - page : 4);
        uint64_t count = 0;

        last = last < PAGES ? last : PAGES - 1;
        switch (random_below(8)) {
        case 0:
            direct_map_withdraw(map, page, last);
            for (uint64_t i = page; i <= last; i++)
                model[i] = 0;
            break;
        case 1:
            if (random_below(2000) == 0) {
                direct_map_clear(map);
                memset(model, 0, sizeof(model));
            }
            break;
        default:
            for (uint64_t i = page; i <= last; i++) {
                uint64_t host = i + (random_below(8) == 0), writable = random_below(8) != 0;

                CHECK(direct_map_publish(map, i, host << BITS << 1 | writable) == 0);
                model[i] = (host << 1 | writable) + 1;
            }
        }
        page = random_below(PAGES - 3);
        count = 1 + random_below(3);
        for (int writable = 0; writable < 2; writable++)
            CHECK(direct_map_find(map, page << BITS, count << BITS, writable) ==
                  model_find(page, count, writable));
        if (round % 1000 == 0) {
            count = 0;
            for (uint64_t i = 0; i < PAGES; i++)
                count += model[i] != 0;
            CHECK(count == map->pages.count);
        }
    }
    CHECK(map->pages.capacity <= 8192);
    direct_map_close(map);
}

static void test_edges(void)
{
    const uint64_t edges[] = {0, 1, 511, 512, UINT32_MAX, (uint64_t)UINT32_MAX + 1, INT64_MAX,
                              (uint64_t)INT64_MAX + 1, UINT64_MAX - 511, UINT64_MAX};
    const uint32_t bits[] = {0, 1, 9, 62, 63};

    for (unsigned b = 0; b < sizeof(bits) / sizeof(bits[0]); b++) {
        struct direct_map *map = direct_map_open(3, MAP_IO_AIO, bits[b], UINT64_MAX, 1, 1, 0);

        CHECK(map != NULL);
        for (unsigned i = 0; i < 10; i++)
            if (edges[i] != UINT64_MAX)
                CHECK(direct_map_publish(map, edges[i], UINT64_MAX) == 0);
        CHECK(direct_map_publish(map, UINT64_MAX, 1) < 0);
        for (unsigned i = 0; i < 10; i++)
            for (unsigned j = 0; j < 10; j++) {
                int64_t host = direct_map_find(map, edges[i], edges[j], 1);

                CHECK(host >= -1);
                if (host >= 0)
                    CHECK(edges[j] > 0 && edges[j] <= UINT64_MAX - edges[i]);
            }
        direct_map_withdraw(map, 1, UINT64_MAX);
        CHECK(map->pages.count == 1);
        direct_map_withdraw(map, UINT64_MAX, UINT64_MAX);
        direct_map_withdraw(map, 2, 1);
        direct_map_withdraw(map, 0, 0);
        CHECK(map->pages.count == 0);
        direct_map_close(map);
    }
    CHECK(direct_map_open(3, MAP_IO_AIO, 64, 0, 1, 1, 0) == NULL);
}

static void test_pins(void)
{
    struct direct_map *map = direct_map_open(3, MAP_IO_AIO, 62, 4096, 512, 512, 0);
    struct map_pin pins[3];

    CHECK(map != NULL);
    CHECK(direct_map_oldest(map) == UINT64_MAX);
    for (int i = 0; i < 3; i++)
        direct_map_pin(map, &pins[i]);
    CHECK(direct_map_oldest(map) == 1 && map->serial == 3);
    CHECK(direct_map_unpin(map, &pins[1]) == 0);
    map->watched = 2;
    CHECK(direct_map_unpin(map, &pins[0]) == 1);
    CHECK(map->watched == 0 && direct_map_oldest(map) == 3);
    CHECK(direct_map_unpin(map, &pins[2]) == 0);
    CHECK(direct_map_oldest(map) == UINT64_MAX);
    direct_map_close(map);
}

int main(void)
{
    test_random_changes();
    test_edges();
    test_pins();
    return 0;
}
