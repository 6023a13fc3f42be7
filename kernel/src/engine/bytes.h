/* Work on bytes in memory, without a disk: zeros, differences, packing, ciphers, checksums, marks. */
#ifndef TAPFS_BYTES_H
#define TAPFS_BYTES_H

#include "engine/engine.h"

/* cffi: begin */

/*
 * Open the shared library of a codec that the engine is not linked with: BZIP2, LZMA and LZFSE, which no layer can have
 * before. 0, -EINVAL (another codec) or -ENOPKG (no such library, or one without the function).
 */
int tapfs_codec_library(uint32_t codec, const char *path);

/* Open libnettle, which has the ciphers that libcrypto lacks. Once open it stays. 0 or -ENOPKG. */
int tapfs_cipher_library(const char *path);

/* Encrypt or decrypt bytes in memory, whole sectors, as if `offset` were their place. 0, -EINVAL or -ENOMEM. */
int tapfs_cipher_apply(const tapfs_cipher *spec, int encrypt, uint8_t *buffer, uint64_t offset, uint64_t length);

/* Whether the bytes are all zero. */
int tapfs_is_zero(const void *buffer, uint64_t length);
/*
 * The runs of granules that are not all zero, as (offset, length) pairs in `runs`, at most `capacity`
 * pairs; `scanned` is how far it came. The last granule may be short. Returns the number of pairs.
 */
size_t tapfs_find_data(const void *buffer, uint64_t length, uint64_t granule, uint64_t *runs,
                       size_t capacity, uint64_t *scanned);
/*
 * What is to be written of ranges that were read into `content`, one behind the other: the granules, which begin at
 * multiples of `granule` of the disk, that differ from `below` (NULL: all). Those with data become segments into
 * `content`, those of zeros become `zeros` (NULL: they are left out). A range gives at most
 * length / (2 * granule) + 2 of each. The number of segments.
 */
size_t tapfs_find_segments(const tapfs_range *ranges, size_t count, const void *content, const void *below,
                           uint64_t granule, tapfs_segment *segments, tapfs_range *zeros, size_t *zero_count);
/* The offset of the first byte that differs, or `length`. */
uint64_t tapfs_first_difference(const void *left, const void *right, uint64_t length);

/* Whether the processor has the instruction for CRC-32C; without it the other must not be called. */
int tapfs_has_crc32c(void);
uint32_t tapfs_crc32c(const void *buffer, uint64_t length);

/*
 * Set marks[word >> unit_bits] for each of `count` big-endian words that is not zero. How many these are, and the
 * greatest of them; -1 where a word is no multiple of the unit, or names one that has no mark.
 */
int64_t tapfs_mark_units(const void *words, uint64_t count, unsigned unit_bits, uint8_t *marks, uint64_t units,
                         uint64_t *greatest);

/*
 * Compress `count` granules, each on its own, into `out` one after the other; sizes[i] is 0 where a
 * granule does not shrink (nothing is put into `out` for it). `out` holds count * granule bytes.
 * 0 or -errno.
 */
int tapfs_compress(uint32_t codec, const void *buffer, uint64_t granule, size_t count, void *out,
                   uint64_t *sizes);

/* cffi: end */

/* What packing needs, for one thread at a time; each part of it is made when it is first wanted. NULL: no memory. */
typedef struct tapfs_packers tapfs_packers;
tapfs_packers *tapfs_packers_new(void);
void tapfs_packers_free(tapfs_packers *packers);
/*
 * Compress one granule into `out`, which has room for `length` bytes; `size` is 0 where it does not shrink. 0, -EINVAL (a
 * codec that does not pack, a length that no granule has) or -ENOMEM.
 */
int tapfs_pack(tapfs_packers *packers, uint32_t codec, const void *granule, uint64_t length, void *out, uint64_t *size);

#endif
