/* Packing by raw deflate (RFC 1951) whose distances stay below a small window. */
#ifndef TAPFS_ENGINE_DEFLATE_H
#define TAPFS_ENGINE_DEFLATE_H

#include <stddef.h>

#include "common.h"

/* Distances of matches stay below it: a reader may use zlib with window bits -12. */
#define DEFLATE_WINDOW 4096u

/* Bytes of a granule that one block holds at most. */
#define DEFLATE_BLOCK (64u << 10)
#define DEFLATE_SHORTEST 3u
#define DEFLATE_LONGEST 258u

/* So many literals, then a match; a length of 0 ends the block's last literals. */
struct deflate_sequence {
    uint32_t literals;
    uint16_t length;
    uint16_t distance;
};

/* What a block is made of: its bytes, as sequences, and how often each symbol occurs in them. */
struct deflate_block {
    const uint8_t *in;
    size_t length;
    size_t count;
    uint32_t symbols[286];
    uint32_t distances[24];
    struct deflate_sequence sequences[DEFLATE_BLOCK / DEFLATE_SHORTEST + 2];
};

/* Bits on their way into memory, the first one lowest. */
struct bit_writer {
    uint8_t *at;
    uint8_t *end;
    uint64_t bits;
    unsigned count;
};

/* The length code of a length, less 257, and the extra bits that follow it. */
static inline unsigned length_code(unsigned length, unsigned *extra)
{
    unsigned rest = length - DEFLATE_SHORTEST;
    if (rest < 8 || length == DEFLATE_LONGEST) {
        *extra = 0;
        return length == DEFLATE_LONGEST ? 28 : rest;
    }
    *extra = 29u - (unsigned)__builtin_clz(rest);
    return 4 * *extra + (rest >> *extra);
}

/* The distance code of a distance, and the extra bits that follow it. */
static inline unsigned distance_code(unsigned distance, unsigned *extra)
{
    unsigned rest = distance - 1;
    if (rest < 4) {
        *extra = 0;
        return rest;
    }
    *extra = 30u - (unsigned)__builtin_clz(rest);
    return 2 * *extra + (rest >> *extra);
}

/* How often each of the 256 bytes occurs. flat.c */
TAPFS_INTERNAL void count_bytes(const uint8_t *in, size_t length, uint32_t *counts);
/* Whether packing would surely, or as good as surely, not make the bytes fewer. flat.c */
TAPFS_INTERNAL bool does_not_shrink(const uint8_t *in, uint64_t length);

/* Append a block, packed or stored, whichever is shorter. false: there is no room for it. deflate_block.c */
TAPFS_INTERNAL bool deflate_put_block(struct deflate_block *block, bool last, struct bit_writer *writer);

/* The code lengths of symbols by their frequencies, none above `longest`; 0 where a symbol does not occur. huffman.c */
TAPFS_INTERNAL void huffman_lengths(const uint32_t *frequencies, unsigned count, unsigned longest, uint8_t *lengths);
/* The codes of those lengths, as deflate orders them (RFC 1951, 3.2.2), the first bit lowest. huffman.c */
TAPFS_INTERNAL void huffman_codes(const uint8_t *lengths, unsigned count, uint16_t *codes);

/* What packing needs, for one thread. deflate.c */
struct deflater;
TAPFS_INTERNAL struct deflater *deflater_new(void);
TAPFS_INTERNAL void deflater_free(struct deflater *deflater);
/* Pack `length` bytes; the bytes of the stream, or 0 where they are more than `room`. deflate.c */
TAPFS_INTERNAL size_t deflater_pack(struct deflater *deflater, const uint8_t *in, size_t length, uint8_t *out,
                                    size_t room);

#endif
