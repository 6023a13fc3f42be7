/* Memory that data passes through where the frontend's pages are not mapped. The lowest free pages come first: they
 * are the ones that the processor's cache has. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "xen/internal.h"

int xen_buffers_init(struct xen_buffers *buffers, uint32_t pages)
{
    memset(buffers, 0, sizeof *buffers);
    buffers->pages = (uint32_t)minimum(pages, BUFFER_PAGES_MAX);
    buffers->memory = aligned_alloc(XEN_PAGE, (size_t)buffers->pages * XEN_PAGE);
    return buffers->memory == NULL ? ENOMEM : 0;
}

void xen_buffers_destroy(struct xen_buffers *buffers)
{
    free(buffers->memory);
}

/* The next page from `from` on that is taken (or, with `taken` false, that is free); `pages` if there is none. */
static uint32_t next_page(const struct xen_buffers *buffers, uint32_t from, bool taken)
{
    while (from < buffers->pages) {
        uint64_t word = buffers->taken[from / 64];
        word = (taken ? word : ~word) >> (from % 64);
        if (word != 0) {
            from += (uint32_t)__builtin_ctzll(word);
            break;
        }
        from = (from / 64 + 1) * 64;
    }
    return (uint32_t)minimum(from, buffers->pages);
}

static void mark(struct xen_buffers *buffers, uint32_t first, uint32_t count, bool taken)
{
    while (count > 0) {
        uint32_t bit = first % 64, here = (uint32_t)minimum(count, 64 - bit);
        uint64_t mask = (here == 64 ? UINT64_MAX : (UINT64_C(1) << here) - 1) << bit;
        if (taken) {
            buffers->taken[first / 64] |= mask;
        } else {
            buffers->taken[first / 64] &= ~mask;
        }
        first += here;
        count -= here;
    }
}

static uint32_t pages_of(uint64_t bytes)
{
    return (uint32_t)((bytes + XEN_PAGE - 1) / XEN_PAGE);
}

uint8_t *xen_buffers_take(struct xen_buffers *buffers, uint64_t bytes)
{
    uint32_t wanted = pages_of(bytes), end;

    for (uint32_t first = next_page(buffers, 0, false); first < buffers->pages;
         first = next_page(buffers, end, false)) {
        end = next_page(buffers, first, true);
        if (end - first >= wanted) {
            mark(buffers, first, wanted, true);
            return buffers->memory + (size_t)first * XEN_PAGE;
        }
    }
    return NULL;
}

void xen_buffers_return(struct xen_buffers *buffers, const uint8_t *buffer, uint64_t bytes)
{
    mark(buffers, (uint32_t)((size_t)(buffer - buffers->memory) / XEN_PAGE), pages_of(bytes), false);
    buffers->returned = true;
}
