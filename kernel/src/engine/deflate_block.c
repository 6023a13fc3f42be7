/* A block of deflate, put into memory by its own codes or stored (RFC 1951, 3.2). */
#include <endian.h>
#include <string.h>

#include "engine/deflate.h"

#define LITERALS 256u
#define END_OF_BLOCK 256u
#define FIRST_LENGTH 257u
#define SYMBOLS 286u
#define DISTANCES 24u
#define LONGEST_CODE 15u
#define LONGEST_LENGTH_CODE 7u
#define LENGTH_CODES 19u
#define STORED_LARGEST 65535u

/* Symbols of the code lengths: the one before, or zero, again so often. */
enum { REPEAT = 16, ZEROS = 17, MANY_ZEROS = 18 };
static const uint8_t extra_of_repeats[LENGTH_CODES] = {[REPEAT] = 2, [ZEROS] = 3, [MANY_ZEROS] = 7};
/* The order in which the lengths of these symbols' codes are written (RFC 1951, 3.2.7). */
static const uint8_t order[LENGTH_CODES] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};

struct codes {
    uint8_t symbol_lengths[SYMBOLS], distance_lengths[DISTANCES], length_lengths[LENGTH_CODES];
    uint16_t symbols[SYMBOLS], distances[DISTANCES], lengths[LENGTH_CODES];
    /* The code lengths of both alphabets, as symbols and what they repeat. */
    uint8_t runs[SYMBOLS + DISTANCES], repeats[SYMBOLS + DISTANCES];
    unsigned run_count, symbol_count, distance_count, length_count;
};

static void flush_bits(struct bit_writer *writer)
{
    if (writer->end - writer->at >= 8) {
        uint64_t word = htole64(writer->bits);
        memcpy(writer->at, &word, 8);
        unsigned whole = writer->count >> 3;
        writer->at += whole;
        writer->bits = whole == 8 ? 0 : writer->bits >> (8 * whole);
        writer->count &= 7;
        return;
    }
    for (; writer->count >= 8; writer->count -= 8) {
        *writer->at++ = (uint8_t)writer->bits;
        writer->bits >>= 8;
    }
}

/* `count` bits; with those that wait no more than 64. */
static void add_bits(struct bit_writer *writer, uint64_t bits, unsigned count)
{
    writer->bits |= bits << writer->count;
    writer->count += count;
}

static void put_bits(struct bit_writer *writer, uint64_t bits, unsigned count)
{
    add_bits(writer, bits, count);
    flush_bits(writer);
}

/* ---- the head of a block */

static void add_run(struct codes *codes, uint32_t *frequencies, unsigned symbol, unsigned repeat)
{
    codes->runs[codes->run_count] = (uint8_t)symbol;
    codes->repeats[codes->run_count++] = (uint8_t)repeat;
    frequencies[symbol]++;
}

/* Both alphabets' code lengths in a row, as runs. */
static void find_runs(struct codes *codes, uint32_t *frequencies)
{
    uint8_t all[SYMBOLS + DISTANCES];
    unsigned count = codes->symbol_count + codes->distance_count;

    memcpy(all, codes->symbol_lengths, codes->symbol_count);
    memcpy(all + codes->symbol_count, codes->distance_lengths, codes->distance_count);
    for (unsigned at = 0; at < count;) {
        unsigned length = all[at], same = 1;
        while (at + same < count && all[at + same] == length) {
            same++;
        }
        at += same;
        if (length != 0) {
            add_run(codes, frequencies, length, 0);
            same--;
        }
        while (same >= 3) {
            unsigned most = length != 0 ? 6 : 138, part = same < most ? same : most;
            /* A rest of one or two would be written symbol by symbol. */
            if (length != 0) {
                add_run(codes, frequencies, REPEAT, part - 3);
            } else if (part < 11) {
                add_run(codes, frequencies, ZEROS, part - 3);
            } else {
                add_run(codes, frequencies, MANY_ZEROS, part - 11);
            }
            same -= part;
        }
        for (; same > 0; same--) {
            add_run(codes, frequencies, length, 0);
        }
    }
}

static unsigned used(const uint8_t *lengths, unsigned count, unsigned least)
{
    while (count > least && lengths[count - 1] == 0) {
        count--;
    }
    return count;
}

static void make_codes(struct codes *codes, const struct deflate_block *block)
{
    uint32_t frequencies[LENGTH_CODES] = {0};
    uint8_t ordered[LENGTH_CODES];

    codes->run_count = 0;
    huffman_lengths(block->symbols, SYMBOLS, LONGEST_CODE, codes->symbol_lengths);
    huffman_lengths(block->distances, DISTANCES, LONGEST_CODE, codes->distance_lengths);
    codes->symbol_count = used(codes->symbol_lengths, SYMBOLS, FIRST_LENGTH);
    codes->distance_count = used(codes->distance_lengths, DISTANCES, 1);
    find_runs(codes, frequencies);
    huffman_lengths(frequencies, LENGTH_CODES, LONGEST_LENGTH_CODE, codes->length_lengths);
    for (unsigned i = 0; i < LENGTH_CODES; i++) {
        ordered[i] = codes->length_lengths[order[i]];
    }
    codes->length_count = used(ordered, LENGTH_CODES, 4);
}

/* Bits of the block by its own codes, without the three that begin it. */
static uint64_t packed_bits(const struct codes *codes, const struct deflate_block *block)
{
    uint64_t bits = 14 + 3 * codes->length_count;
    unsigned extra;

    for (unsigned i = 0; i < codes->run_count; i++) {
        bits += codes->length_lengths[codes->runs[i]] + extra_of_repeats[codes->runs[i]];
    }
    for (unsigned symbol = 0; symbol < SYMBOLS; symbol++) {
        bits += (uint64_t)block->symbols[symbol] * codes->symbol_lengths[symbol];
    }
    for (unsigned i = 0; i < DISTANCES; i++) {
        bits += (uint64_t)block->distances[i] * (codes->distance_lengths[i] + (i < 4 ? 0 : i / 2 - 1));
    }
    for (size_t i = 0; i < block->count; i++) {
        if (block->sequences[i].length > 0) {
            length_code(block->sequences[i].length, &extra);
            bits += extra;
        }
    }
    return bits;
}

static void put_head(const struct codes *codes, struct bit_writer *writer)
{
    put_bits(writer, codes->symbol_count - FIRST_LENGTH, 5);
    put_bits(writer, codes->distance_count - 1, 5);
    put_bits(writer, codes->length_count - 4, 4);
    for (unsigned i = 0; i < codes->length_count; i++) {
        put_bits(writer, codes->length_lengths[order[i]], 3);
    }
    for (unsigned i = 0; i < codes->run_count; i++) {
        put_bits(writer, codes->lengths[codes->runs[i]], codes->length_lengths[codes->runs[i]]);
        put_bits(writer, codes->repeats[i], extra_of_repeats[codes->runs[i]]);
    }
}

/* ---- its bytes */

static void put_literals(const struct codes *codes, const uint8_t *in, size_t count, struct bit_writer *writer)
{
    size_t at = 0;

    /* Three codes of at most 15 bits beside seven that wait. */
    for (; at + 3 <= count; at += 3) {
        for (unsigned i = 0; i < 3; i++) {
            add_bits(writer, codes->symbols[in[at + i]], codes->symbol_lengths[in[at + i]]);
        }
        flush_bits(writer);
    }
    for (; at < count; at++) {
        add_bits(writer, codes->symbols[in[at]], codes->symbol_lengths[in[at]]);
    }
    flush_bits(writer);
}

/* A length and a distance: at most 15 + 5 and 15 + 10 bits. */
static void put_match(const struct codes *codes, const struct deflate_sequence *sequence, struct bit_writer *writer)
{
    unsigned extra, code = FIRST_LENGTH + length_code(sequence->length, &extra);
    add_bits(writer, codes->symbols[code], codes->symbol_lengths[code]);
    add_bits(writer, (sequence->length - DEFLATE_SHORTEST) & ((1u << extra) - 1), extra);
    code = distance_code(sequence->distance, &extra);
    add_bits(writer, codes->distances[code], codes->distance_lengths[code]);
    add_bits(writer, (sequence->distance - 1u) & ((1u << extra) - 1), extra);
    flush_bits(writer);
}

static void put_packed(struct codes *codes, const struct deflate_block *block, bool last, struct bit_writer *writer)
{
    const uint8_t *in = block->in;

    huffman_codes(codes->symbol_lengths, SYMBOLS, codes->symbols);
    huffman_codes(codes->distance_lengths, DISTANCES, codes->distances);
    huffman_codes(codes->length_lengths, LENGTH_CODES, codes->lengths);
    put_bits(writer, last, 1);
    put_bits(writer, 2, 2);
    put_head(codes, writer);
    for (size_t i = 0; i < block->count; i++) {
        put_literals(codes, in, block->sequences[i].literals, writer);
        in += block->sequences[i].literals;
        if (block->sequences[i].length > 0) {
            put_match(codes, &block->sequences[i], writer);
            in += block->sequences[i].length;
        }
    }
    put_bits(writer, codes->symbols[END_OF_BLOCK], codes->symbol_lengths[END_OF_BLOCK]);
}

static void put_stored(const uint8_t *in, size_t length, bool last, struct bit_writer *writer)
{
    while (length > 0) {
        size_t part = length < STORED_LARGEST ? length : STORED_LARGEST;
        put_bits(writer, last && part == length, 3);
        put_bits(writer, 0, -writer->count & 7);
        put_bits(writer, part | (part ^ 0xFFFF) << 16, 32);
        memcpy(writer->at, in, part);
        writer->at += part;
        in += part;
        length -= part;
    }
}

/* Bytes of a stored block behind `waiting` bits, and of the bits themselves. */
static size_t stored_bytes(size_t length, unsigned waiting)
{
    size_t blocks = (length + STORED_LARGEST - 1) / STORED_LARGEST;
    return (waiting + 3 + 7) / 8 + 4 + (blocks - 1) * 5 + length;
}

bool deflate_put_block(struct deflate_block *block, bool last, struct bit_writer *writer)
{
    struct codes codes;
    size_t room = (size_t)(writer->end - writer->at);

    block->symbols[END_OF_BLOCK] = 1;
    make_codes(&codes, block);
    size_t packed = (size_t)((writer->count + 3 + packed_bits(&codes, block) + 7) / 8);
    size_t stored = stored_bytes(block->length, writer->count);
    if ((packed < stored ? packed : stored) > room) {
        return false;
    }
    if (packed <= stored) {
        put_packed(&codes, block, last, writer);
    } else {
        put_stored(block->in, block->length, last, writer);
    }
    return true;
}
