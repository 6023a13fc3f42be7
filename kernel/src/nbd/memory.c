/*
 * Memory of pieces. The host takes long to give a large piece's memory and to take it back, so a loop keeps some of it.
 */
#include <stdlib.h>

#include "nbd/internal.h"

/* Less is malloc's own. */
#define LARGE_BYTES (64u << 10)
#define SPARE_BYTES (sizeof(struct nbd_piece) + PIECE_BYTES)
#define SPARES_MAX 8u

struct spare {
    struct spare *next;
};

void *nbd_memory_take(struct nbd_loop *loop, size_t bytes, bool *spare)
{
    *spare = bytes >= LARGE_BYTES && bytes <= SPARE_BYTES;
    if (!*spare) {
        return malloc(bytes);
    }
    struct spare *kept = loop->spares;
    if (kept == NULL) {
        return malloc(SPARE_BYTES);
    }
    loop->spares = kept->next;
    loop->spare_count--;
    return kept;
}

void nbd_memory_give(struct nbd_loop *loop, void *memory, bool spare)
{
    if (!spare || loop->spare_count == SPARES_MAX) {
        free(memory);
        return;
    }
    struct spare *kept = memory;
    kept->next = loop->spares;
    loop->spares = kept;
    loop->spare_count++;
}

void nbd_memory_free(struct nbd_loop *loop)
{
    for (struct spare *spare = loop->spares, *next; spare != NULL; spare = next) {
        next = spare->next;
        free(spare);
    }
    loop->spares = NULL;
    loop->spare_count = 0;
}
