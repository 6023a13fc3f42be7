/* A quick look for granules that no packer makes shorter: packed, encrypted or random bytes. */
#include <string.h>

#include "engine/deflate.h"

/* A text is known by its first bytes. */
#define FIRST_BYTES 4096u
#define HASH_BITS 15
/* Deflate looks back so far. */
#define WINDOW_BYTES 32768u
/* Four bytes that come again save two at most, and the codes of a block take more than all of these. */
#define MOST_REPEATS 8

void count_bytes(const uint8_t *in, size_t length, uint32_t *counts)
{
    uint32_t lanes[4][256] = {{0}}; /* four, so that equal neighbours do not wait for each other */
    size_t i = 0;

    for (; i + 4 <= length; i += 4) {
        for (unsigned lane = 0; lane < 4; lane++) {
            lanes[lane][in[i + lane]]++;
        }
    }
    for (; i < length; i++) {
        lanes[0][in[i]]++;
    }
    for (unsigned byte = 0; byte < 256; byte++) {
        counts[byte] = lanes[0][byte] + lanes[1][byte] + lanes[2][byte] + lanes[3][byte];
    }
}

/* Whether all bytes are about equally frequent: codes for single bytes would save less than they take. */
static bool equally_frequent(const uint8_t *in, uint64_t length)
{
    uint32_t counts[256];
    uint64_t squares = 0;

    count_bytes(in, length, counts);
    for (unsigned byte = 0; byte < 256; byte++) {
        squares += (uint64_t)counts[byte] * counts[byte];
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
