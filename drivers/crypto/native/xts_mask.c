/* SPDX-License-Identifier: Apache-2.0 */
/* The part of XTS that isn't the block cipher (IEEE 1619, 5.1): XOR each 16-byte block with its
 * mask. A sector's first mask is its tweak, encrypted by the caller; each next one is the one
 * before, doubled in GF(2^128). `source` and `target` may be the same buffer. */

#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
#define LITTLE(x) __builtin_bswap64(x)
#else
#define LITTLE(x) (x)
#endif

void xts_mask(const unsigned char *tweaks, size_t sectors, size_t sector_bytes,
              const unsigned char *source, unsigned char *target)
{
    for (size_t sector = 0; sector < sectors; sector++) {
        uint64_t mask[2];
        memcpy(mask, tweaks + sector * 16, 16);
        uint64_t low = LITTLE(mask[0]), high = LITTLE(mask[1]);
        for (size_t done = 0; done < sector_bytes; done += 16) {
            uint64_t block[2];
            memcpy(block, source, 16);
            block[0] ^= LITTLE(low);
            block[1] ^= LITTLE(high);
            memcpy(target, block, 16);
            source += 16;
            target += 16;
            uint64_t carry = high >> 63;
            high = high << 1 | low >> 63;
            low = low << 1 ^ (0x87 & -carry);
        }
    }
}
