/* A quick look for granules that no packer makes shorter: packed, encrypted or random bytes. */
#include <string.h>

#include "engine/internal.h"

/* A text is known by its first bytes. */
#define FIRST_BYTES 4096u
#define HASH_BITS 15
/* Deflate looks back so far. */
#define WINDOW_BYTES 32768u
/* Four bytes that come again save two at most, and the codes of a block take more than all of these. */
#define MOST_REPEATS 8

/* Whether all bytes are about equally frequent: codes for single bytes would save less than they take. */
static bool equally_frequent(const uint8_t *in, uint64_t length)
{
    uint32_t counts[4][256] = {{0}}; /* four, so that equal neighbours do not wait for each other */
    uint64_t squares = 0;

    for (uint64_t i = 0; i + 4 <= length; i += 4) {
        for (unsigned lane = 0; lane < 4; lane++) {
            counts[lane][in[i + lane]]++;
        }
    }
    for (unsigned byte = 0; byte < 256; byte++) {
        uint64_t sum = (uint64_t)counts[0][byte] + counts[1][byte] + counts[2][byte] + counts[3][byte];
        squares += sum * sum;
    }
    /* Random bytes give length / 256 + 1 for each byte. */
    return squares <= length * (length / 256 + 2);
}

static uint32_t word_at(const uint8_t *in)
{
    uint32_t word;
    memcpy(&word, in, sizeof word);
    return word;
}

/* Whether four bytes hardly ever come again. Of equal hashes the last place is known, so some may be missed. */
static bool without_repeats(const uint8_t *in, uint64_t length)
{
    uint16_t places[1u << HASH_BITS] = {0};
    unsigned repeats = 0;

    for (uint64_t at = 0; at + 4 <= length; at++) {
        uint32_t word = word_at(in + at);
        uint16_t *place = &places[word * 2654435761u >> (32 - HASH_BITS)];
        uint64_t distance = (uint16_t)(at - *place); /* never more than `at` */
        /* Of random bytes this is hardly ever so; their distances are anything. */
        if (word_at(in + at - distance) == word && distance > 0 && distance <= WINDOW_BYTES &&
            ++repeats > MOST_REPEATS) {
            return false;
        }
        *place = (uint16_t)at;
    }
    return true;
}

bool does_not_shrink(const uint8_t *in, uint64_t length)
{
    return equally_frequent(in, minimum(length, FIRST_BYTES)) && equally_frequent(in, length) &&
           without_repeats(in, length);
}
