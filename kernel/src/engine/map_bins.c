/* A map counted into bins: bytes of each kind for each piece of the disk, breaks on the host, and a plot of disk against host. */
#include "engine/map_runs.h"
#include "common.h"

static bool fits(const tapfs_bin_shape *shape, const tapfs_mapped *run)
{
    return shape->layer == run->layer && shape->file == run->file && shape->kind == run->kind &&
           shape->placed == run->placed;
}

static void count_bytes(tapfs_map_bins *into, uint32_t column, uint64_t offset, uint64_t end)
{
    offset = maximum(offset, into->start);
    end = minimum(end, into->start + into->width * into->count);
    while (offset < end) {
        uint64_t bin = (offset - into->start) / into->width;
        uint64_t upto = minimum(end, into->start + (bin + 1) * into->width);

        into->bytes[bin * into->columns + column] += upto - offset;
        offset = upto;
    }
}

static void plot(tapfs_map_bins *into, const tapfs_mapped *run)
{
    uint64_t done = 0;

    while (done < run->length) {
        uint64_t x = (run->offset + done) / into->plot_x, y = (run->host_offset + done) / into->plot_y;
        uint64_t to_x = (x + 1) * into->plot_x - run->offset, to_y = (y + 1) * into->plot_y - run->host_offset;
        uint64_t upto = minimum(run->length, minimum(to_x, to_y));

        if (x >= into->plot_across || y >= into->plot_down) {
            return; /* behind the end of the file: a damaged image may say any place */
        }
        into->plot[y * into->plot_across + x] += upto - done;
        done = upto;
    }
}

/* The first place that is asked for and not before `offset`. */
static size_t first_place(const tapfs_map_bins *into, uint64_t offset)
{
    size_t low = 0, high = into->place_count;

    while (low < high) {
        size_t middle = (low + high) / 2;

        if (into->places[middle] < offset) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

static void find_places(tapfs_map_bins *into, const tapfs_mapped *run)
{
    for (size_t at = first_place(into, run->host_offset);
         at < into->place_count && into->places[at] - run->host_offset < run->length; at++) {
        into->found[at] = run->offset + (into->places[at] - run->host_offset);
    }
}

static void end_fragment(tapfs_map_bins *into)
{
    unsigned power = 0;

    if (into->fragment_length == 0) {
        return;
    }
    while (power < 63 && into->fragment_length >> (power + 1) != 0) {
        power++;
    }
    into->fragments[power]++;
    into->fragment_length = 0;
}

static void follow(tapfs_map_bins *into, const tapfs_mapped *run, size_t shape)
{
    if (shape != into->fragment_shape || run->host_offset != into->fragment_end) {
        end_fragment(into);
    }
    into->fragment_shape = shape;
    into->fragment_length += run->length;
    into->fragment_end = run->host_offset + run->length;
}

size_t tapfs_map_count(tapfs_map_bins *into, const tapfs_mapped *runs, size_t count, const tapfs_bin_shape *shapes,
                       size_t shape_count)
{
    size_t last = 0, done = 0;

    for (; done < count; done++) {
        const tapfs_mapped *run = &runs[done];

        if (last >= shape_count || !fits(&shapes[last], run)) {
            for (last = 0; last < shape_count && !fits(&shapes[last], run); last++) {
            }
            if (last == shape_count) {
                break;
            }
        }
        count_bytes(into, shapes[last].column, run->offset, run->offset + run->length);
        into->runs[shapes[last].column]++;
        if (!shapes[last].data || !run->placed) {
            continue;
        }
        follow(into, run, last);
        if (shapes[last].plotted) {
            plot(into, run);
            find_places(into, run);
        }
    }
    return done;
}

void tapfs_map_count_end(tapfs_map_bins *into)
{
    end_fragment(into);
}
