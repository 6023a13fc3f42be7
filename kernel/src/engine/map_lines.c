/* Runs of a map as lines of text. What the words of a line mean is the owner's; here numbers are put between them. */
#include <string.h>

#include "engine/map_runs.h"
#include "common.h"

/* Characters of a line besides the words of its shape: two separators, names of keys, three numbers, padding. */
#define LINE_MAX_BYTES 160u
/* Of a column that ends with a number. */
#define COLUMN 16u

static char *put(char *at, const char *text, size_t length)
{
    memcpy(at, text, length);
    return at + length;
}

static char *put_number(char *at, uint64_t value, unsigned base)
{
    char digits[20];
    size_t count = 0;

    do {
        digits[count++] = "0123456789abcdef"[value % base];
        value /= base;
    } while (value > 0);
    while (count > 0) {
        *at++ = digits[--count];
    }
    return at;
}

static char *pad(char *at, const char *start)
{
    while (at < start + COLUMN - 1) {
        *at++ = ' ';
    }
    *at++ = ' ';
    return at;
}

static char *put_hexadecimal(char *at, uint64_t value)
{
    return pad(put_number(put(at, "0x", 2), value, 16), at);
}

static char *put_row(char *at, const tapfs_mapped *run, const tapfs_line_shape *shape)
{
    at = put_hexadecimal(at, run->offset);
    at = put_hexadecimal(at, run->length);
    at = run->placed ? put_hexadecimal(at, run->host_offset) : pad(put(at, shape->place, strlen(shape->place)), at);
    at = put(at, shape->words, strlen(shape->words));
    return put(at, "\n", 1);
}

#define PUT_WORD(at, word) put(at, word, sizeof word - 1)

static char *put_object(char *at, const tapfs_mapped *run, const tapfs_line_shape *shape)
{
    at = put_number(PUT_WORD(at, ",\n{\"start\": "), run->offset, 10);
    at = put_number(PUT_WORD(at, ", \"length\": "), run->length, 10);
    at = put(PUT_WORD(at, ", "), shape->words, strlen(shape->words));
    if (run->placed) {
        at = put_number(PUT_WORD(at, ", \"offset\": "), run->host_offset, 10);
    }
    return PUT_WORD(at, "}");
}

static bool fits(const tapfs_line_shape *shape, const tapfs_mapped *run)
{
    return shape->layer == run->layer && shape->file == run->file && shape->kind == run->kind &&
           shape->placed == run->placed;
}

size_t tapfs_map_lines(const tapfs_mapped *runs, size_t count, const tapfs_line_shape *shapes, size_t shape_count,
                       int json, char *text, size_t capacity, size_t *used)
{
    char *at = text;
    size_t last = 0, done = 0;

    for (; done < count; done++) {
        if (last >= shape_count || !fits(&shapes[last], &runs[done])) {
            for (last = 0; last < shape_count && !fits(&shapes[last], &runs[done]); last++) {
            }
            if (last == shape_count) {
                break;
            }
        }
        const tapfs_line_shape *shape = &shapes[last];
        if (shape->hidden) {
            continue;
        }
        if (capacity - (size_t)(at - text) < LINE_MAX_BYTES + strlen(shape->words) + strlen(shape->place)) {
            break;
        }
        at = json ? put_object(at, &runs[done], shape) : put_row(at, &runs[done], shape);
    }
    *used = (size_t)(at - text);
    return done;
}
