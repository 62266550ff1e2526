/* SPDX-License-Identifier: Apache-2.0 */
void xts_mask(const unsigned char *tweaks, size_t sectors, size_t sector_bytes,
              const unsigned char *source, unsigned char *target);
