/*
 * Matches for deflate within a small window, and the choice of them. The bytes of a granule become sequences of literals
 * and matches; deflate_block.c writes these down.
 */
#include <endian.h>
#include <stdlib.h>
#include <string.h>

#include "engine/deflate.h"

/*
 * Measured on 64 KiB granules of programs, byte code, documentation, sources and random words. More bits or positions
 * give half a percent, and take a tenth of the speed or more.
 */
#define HASH_BITS 14u
#define SHORT_HASH_BITS 13u
/* Positions of a chain that are looked at. */
#define DEPTH 8u
/* A match so long is taken without a look at a longer one: here, or a byte later. */
#define NICE_LENGTH 130u
#define LAZY_LENGTH 32u

/* Costs are counted in sixteenths of a bit. */
#define BIT 16
/* About what the codes of a length and of a distance take, without their extra bits. */
#define MATCH_COST (10 * BIT)
/* A literal takes about so much behind those that were counted for it. */
#define FURTHER_COST (5 * BIT)
#define COUNTED_LITERALS 8u
/* A byte that is frequent is mostly in matches, so it costs more than its frequency says. */
#define CHEAPEST_LITERAL (4 * BIT)
#define DEAREST_LITERAL (13 * BIT)
/* Where literals are cheaper on average, few matches of three bytes are near enough to save anything. */
#define SHORT_MATCHES_FROM (5 * BIT + BIT / 2)

struct deflater {
    /* The last position of each hash of four bytes, and of three, and for each position the one before with its hash. */
    uint16_t heads[1u << HASH_BITS];
    uint16_t short_heads[1u << SHORT_HASH_BITS];
    uint16_t before[DEFLATE_WINDOW];
    /* What a literal is likely to cost in this block, and whether matches of three bytes are worth a search. */
    int32_t costs[256];
    bool short_matches;
    struct deflate_block block;
};

struct match {
    unsigned length;
    unsigned distance;
    int32_t gain; /* what it costs less than its bytes as literals */
};

struct deflater *deflater_new(void)
{
    return malloc(sizeof(struct deflater));
}

void deflater_free(struct deflater *deflater)
{
    free(deflater);
}

static uint32_t load(const uint8_t *at)
{
    uint32_t word;
    memcpy(&word, at, sizeof word);
    return le32toh(word);
}

/* ---- matches */

/* The length of the match of `in` with an earlier place, of which `length` bytes are known to be the same. */
static unsigned extend(const uint8_t *in, const uint8_t *earlier, unsigned length, unsigned most)
{
    while (length + 8 <= most) {
        uint64_t here, there;
        memcpy(&here, in + length, 8);
        memcpy(&there, earlier + length, 8);
        uint64_t differ = le64toh(here ^ there);
        if (differ != 0) {
            return length + (unsigned)__builtin_ctzll(differ) / 8;
        }
        length += 8;
    }
    while (length < most && in[length] == earlier[length]) {
        length++;
    }
    return length;
}

/* The distance of a noted position. A position that left the window long ago looks like one within it. */
static unsigned distance_of(uint32_t at, uint16_t noted)
{
    return (at - noted) % DEFLATE_WINDOW;
}

static uint32_t hash_of(uint32_t word)
{
    return word * 0x9E3779B1u >> (32 - HASH_BITS);
}

/* Note a position, of which four bytes are there, and give the distances of those that were noted last with its hashes. */
static inline uint32_t note(struct deflater *deflater, const uint8_t *in, uint32_t at, unsigned *distance,
                            unsigned *short_distance)
{
    uint32_t word = load(in + at);
    uint16_t *head = &deflater->heads[hash_of(word)];

    *distance = distance_of(at, *head);
    deflater->before[at % DEFLATE_WINDOW] = *head;
    *head = (uint16_t)at;
    *short_distance = 0;
    if (deflater->short_matches) {
        uint16_t *short_head = &deflater->short_heads[(word << 8) * 0x85EBCA6Bu >> (32 - SHORT_HASH_BITS)];
        *short_distance = distance_of(at, *short_head);
        *short_head = (uint16_t)at;
    }
    return word;
}

static int32_t gain_of(const struct deflater *deflater, const uint8_t *in, unsigned length, unsigned distance)
{
    unsigned counted = length < COUNTED_LITERALS ? length : COUNTED_LITERALS, extra;
    int32_t literals = (int32_t)(length - counted) * FURTHER_COST;

    for (unsigned i = 0; i < counted; i++) {
        literals += deflater->costs[in[i]];
    }
    distance_code(distance, &extra);
    return literals - MATCH_COST - (int32_t)extra * BIT;
}

/* Whether the four bytes of a position are at a distance, too; the others of a mask do not count. */
static bool repeats(const uint8_t *in, uint32_t at, unsigned distance, uint32_t word, uint32_t mask)
{
    /* At a distance of zero are the bytes themselves. */
    unsigned safe = distance <= at ? distance : 0;
    return (((load(in + at - safe) ^ word) & mask) | (safe == 0)) == 0;
}

/* The longest match in the chain that begins at a distance, where it is longer than the one that was found. */
static inline unsigned follow_chain(const struct deflater *deflater, const uint8_t *in, uint32_t at, uint32_t word,
                                    unsigned most, unsigned distance, unsigned *found_distance)
{
    unsigned longest = 0, last = 0, depth = DEPTH;
    while (distance > last && distance <= at && depth-- > 0) {
        const uint8_t *earlier = in + at - distance;
        if (load(earlier) == word && earlier[longest] == in[at + longest]) {
            unsigned length = extend(in + at, earlier, 4, most);
            if (length > longest) {
                longest = length;
                *found_distance = distance;
                if (length >= NICE_LENGTH || length == most) {
                    break;
                }
            }
        }
        last = distance;
        distance = distance_of(at, deflater->before[(at - distance) % DEFLATE_WINDOW]);
    }
    return longest;
}

/*
 * The best match of a position that has `most` bytes, at least four; the position is noted. The match goes through memory,
 * field by field: a structure as a result would be stored in parts and loaded as a whole, which processors are slow at.
 */
static inline void find_match(struct deflater *deflater, const uint8_t *in, uint32_t at, unsigned most,
                              struct match *found)
{
    unsigned distance, short_distance, length = 0;
    uint32_t word = note(deflater, in, at, &distance, &short_distance);

    if (repeats(in, at, distance, word, UINT32_MAX)) {
        length = follow_chain(deflater, in, at, word, most, distance, &distance);
    } else if (deflater->short_matches && repeats(in, at, short_distance, word, 0xFFFFFF)) {
        length = 3;
        distance = short_distance;
    }
    found->length = length;
    found->distance = distance;
    found->gain = length > 0 ? gain_of(deflater, in + at, length, distance) : 0;
}

/* ---- the choice */

static void count_match(struct deflate_block *block, uint32_t literals, const struct match *match)
{
    unsigned extra;
    block->sequences[block->count++] =
        (struct deflate_sequence){literals, (uint16_t)match->length, (uint16_t)match->distance};
    block->symbols[257 + length_code(match->length, &extra)]++;
    block->distances[distance_code(match->distance, &extra)]++;
}

/* Matches may refer to what lies before the block, and do not go beyond it. */
static void fill_block(struct deflater *deflater, const uint8_t *in, uint32_t at, uint32_t end)
{
    struct deflate_block *block = &deflater->block;
    uint32_t literals = 0;

    block->in = in + at;
    block->length = end - at;
    block->count = 0;
    memset(block->symbols, 0, sizeof block->symbols);
    memset(block->distances, 0, sizeof block->distances);
    while (at + 4 <= end) {
        struct match two[2], *match = &two[0], *next = &two[1];
        find_match(deflater, in, at, (unsigned)minimum(end - at, DEFLATE_LONGEST), match);
        uint32_t noted = at + 1;
        while (match->gain > 0 && match->length < LAZY_LENGTH && noted + 4 <= end) {
            find_match(deflater, in, noted, (unsigned)minimum(end - noted, DEFLATE_LONGEST), next);
            noted++;
            if (next->gain <= match->gain) {
                break;
            }
            block->symbols[in[at++]]++;
            literals++;
            struct match *worse = match;
            match = next;
            next = worse;
        }
        if (match->gain <= 0) {
            block->symbols[in[at++]]++;
            literals++;
            continue;
        }
        count_match(block, literals, match);
        literals = 0;
        at += match->length;
        for (unsigned distance, short_distance; noted < at && noted + 4 <= end; noted++) {
            note(deflater, in, noted, &distance, &short_distance);
        }
    }
    for (; at < end; at++) {
        block->symbols[in[at]]++;
        literals++;
    }
    block->sequences[block->count++] = (struct deflate_sequence){literals, 0, 0};
}

/* The logarithm to base two, in sixteenths; between powers of two along a line. */
static int32_t logarithm(uint32_t value)
{
    unsigned power = 31u - (unsigned)__builtin_clz(value);
    uint64_t fraction = ((uint64_t)value << 4 >> power) & 15;
    return (int32_t)(power * BIT + fraction);
}

static void estimate_literals(struct deflater *deflater, const uint32_t *counts, size_t length)
{
    int64_t sum = 0;
    for (unsigned byte = 0; byte < 256; byte++) {
        int32_t cost = counts[byte] == 0 ? DEAREST_LITERAL : logarithm((uint32_t)length) - logarithm(counts[byte]);
        cost = cost < CHEAPEST_LITERAL ? CHEAPEST_LITERAL : cost > DEAREST_LITERAL ? DEAREST_LITERAL : cost;
        deflater->costs[byte] = cost;
        sum += (int64_t)counts[byte] * cost;
    }
    deflater->short_matches = sum >= (int64_t)length * SHORT_MATCHES_FROM;
}

size_t deflater_pack(struct deflater *deflater, const uint8_t *in, size_t length, uint8_t *out, size_t room)
{
    struct bit_writer writer = {.at = out, .end = out + room};

    memset(deflater->heads, 0, sizeof deflater->heads);
    memset(deflater->short_heads, 0, sizeof deflater->short_heads);
    for (size_t at = 0; at < length; at += DEFLATE_BLOCK) {
        size_t end = minimum(at + DEFLATE_BLOCK, length);
        uint32_t counts[256];
        count_bytes(in + at, end - at, counts);
        estimate_literals(deflater, counts, end - at);
        fill_block(deflater, in, (uint32_t)at, (uint32_t)end);
        if (!deflate_put_block(&deflater->block, end == length, &writer)) {
            return 0;
        }
    }
    if (writer.count > 0) {
        *writer.at++ = (uint8_t)writer.bits;
    }
    return (size_t)(writer.at - out);
}
