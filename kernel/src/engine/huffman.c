/* Huffman codes of bounded length, for deflate. */
#include <string.h>

#include "engine/deflate.h"

#define SYMBOLS 288u
#define LONGEST 15u
/* A block has fewer symbols than 1 << 24. */
#define FREQUENCY_BITS 24u
#define DIGIT_BITS 8u

struct leaf {
    uint32_t frequency;
    uint16_t symbol;
};

/* Sort by frequency, the rarest first: by digits, the lowest first. */
static void sort_leaves(struct leaf *leaves, unsigned count, uint32_t greatest)
{
    struct leaf other[SYMBOLS];

    for (unsigned shift = 0; shift < FREQUENCY_BITS && greatest >> shift != 0; shift += DIGIT_BITS) {
        unsigned places[1u << DIGIT_BITS] = {0}, place = 0;
        for (unsigned i = 0; i < count; i++) {
            places[leaves[i].frequency >> shift & ((1u << DIGIT_BITS) - 1)]++;
        }
        for (unsigned digit = 0; digit < 1u << DIGIT_BITS; digit++) {
            unsigned here = places[digit];
            places[digit] = place;
            place += here;
        }
        for (unsigned i = 0; i < count; i++) {
            other[places[leaves[i].frequency >> shift & ((1u << DIGIT_BITS) - 1)]++] = leaves[i];
        }
        memcpy(leaves, other, count * sizeof leaves[0]);
    }
}

/*
 * Count the leaves of each depth in the tree of sorted leaves. Joined nodes come out in the order of their frequencies,
 * so two queues do: the leaves and the nodes.
 */
static void count_depths(const struct leaf *leaves, unsigned count, unsigned *depths)
{
    uint32_t frequencies[SYMBOLS];
    uint16_t leaf_parents[SYMBOLS], parents[SYMBOLS], levels[SYMBOLS];
    unsigned leaf = 0, node = 0;

    for (unsigned made = 0; made + 1 < count; made++) {
        frequencies[made] = 0;
        for (unsigned side = 0; side < 2; side++) {
            if (leaf < count && (node == made || leaves[leaf].frequency <= frequencies[node])) {
                frequencies[made] += leaves[leaf].frequency;
                leaf_parents[leaf++] = (uint16_t)made;
            } else {
                frequencies[made] += frequencies[node];
                parents[node++] = (uint16_t)made;
            }
        }
    }
    levels[count - 2] = 1;
    for (unsigned i = count - 2; i > 0; i--) {
        levels[i - 1] = (uint16_t)(levels[parents[i - 1]] + 1);
    }
    for (unsigned i = 0; i < count; i++) {
        depths[levels[leaf_parents[i]]]++;
    }
}

/*
 * Shorten what is too deep, as ITU-T T.81, K.2, "Adjust_BITS" does: of two leaves that share the deepest node one takes
 * the node's place, and the other one goes below a leaf that lies higher.
 */
static void bound_depths(unsigned *depths, unsigned deepest, unsigned longest)
{
    for (unsigned depth = deepest; depth > longest; depth--) {
        while (depths[depth] > 0) {
            unsigned higher = depth - 2;
            while (depths[higher] == 0) {
                higher--;
            }
            depths[depth] -= 2;
            depths[depth - 1]++;
            depths[higher + 1] += 2;
            depths[higher]--;
        }
    }
}

void huffman_lengths(const uint32_t *frequencies, unsigned count, unsigned longest, uint8_t *lengths)
{
    struct leaf leaves[SYMBOLS];
    unsigned depths[SYMBOLS + 1] = {0}, used = 0;
    uint32_t greatest = 0;

    memset(lengths, 0, count);
    for (unsigned symbol = 0; symbol < count; symbol++) {
        if (frequencies[symbol] > 0) {
            leaves[used++] = (struct leaf){frequencies[symbol], (uint16_t)symbol};
            greatest = greatest > frequencies[symbol] ? greatest : frequencies[symbol];
        }
    }
    if (used < 2) {
        if (used == 1) {
            lengths[leaves[0].symbol] = 1;
        }
        return;
    }
    sort_leaves(leaves, used, greatest);
    count_depths(leaves, used, depths);
    bound_depths(depths, used - 1, longest);
    unsigned next = 0;
    for (unsigned length = longest; length > 0; length--) {
        for (unsigned i = 0; i < depths[length]; i++) {
            lengths[leaves[next++].symbol] = (uint8_t)length;
        }
    }
}

void huffman_codes(const uint8_t *lengths, unsigned count, uint16_t *codes)
{
    unsigned counts[LONGEST + 1] = {0}, next[LONGEST + 1] = {0};

    for (unsigned symbol = 0; symbol < count; symbol++) {
        counts[lengths[symbol]]++;
    }
    counts[0] = 0;
    for (unsigned length = 1; length <= LONGEST; length++) {
        next[length] = (next[length - 1] + counts[length - 1]) << 1;
    }
    for (unsigned symbol = 0; symbol < count; symbol++) {
        unsigned code = next[lengths[symbol]]++, turned = 0;
        for (unsigned bit = 0; bit < lengths[symbol]; bit++) {
            turned |= (code >> bit & 1u) << (lengths[symbol] - 1u - bit);
        }
        codes[symbol] = (uint16_t)turned;
    }
}
