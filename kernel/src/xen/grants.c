/*
 * Pages that stay mapped ("feature-persistent"): a table from reference to page, under one mutex.
 *
 * Missing pages are mapped in blocks, one call each, and a block is unmapped as a whole, once nobody holds a page of it.
 * Idle blocks stand in a list by the time of their last use; the oldest go when more than the limit is mapped.
 *
 * A reference may be there twice, mapped for reading and for writing. A reader gets the read-only page if there is one,
 * else the writable one, and no read-only page is made beside a writable one. So while a read-only page lives, every reader
 * holds that one, and a release finds the page that its hold found.
 */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>

#include "xen/transport.h"

/* Pages in a block at most: the fewer calls, the better, but one page in use keeps its whole block. */
#define BLOCK_PAGES 32u

struct page {
    struct page *next; /* of the same bucket */
    struct block *block;
    uint8_t *memory;
    uint32_t reference;
    uint32_t holds;
    bool writable;
};

struct block {
    struct block *newer, *older; /* among the idle */
    struct xen_mapping mapping;
    uint32_t held; /* pages of it that are */
    struct page pages[];
};

struct xen_grants {
    struct xen_transport *transport;
    pthread_mutex_t mutex;
    uint32_t limit;
    uint32_t mapped; /* pages */
    struct block *newest, *oldest; /* of the idle blocks, by last use */
    uint32_t mask;
    struct page *buckets[];
};

struct xen_grants *xen_grants_new(struct xen_transport *transport, uint32_t limit)
{
    uint32_t buckets = 64;

    while (buckets < limit && buckets < 1u << 16) {
        buckets *= 2;
    }
    struct xen_grants *grants = calloc(1, sizeof *grants + buckets * sizeof grants->buckets[0]);
    if (grants == NULL) {
        return NULL;
    }
    pthread_mutex_init(&grants->mutex, NULL);
    grants->transport = transport;
    grants->limit = limit;
    grants->mask = buckets - 1;
    return grants;
}

/* Frontends number references one after the other, so neighbours must not meet. */
static struct page **bucket_of(struct xen_grants *grants, uint32_t reference)
{
    return &grants->buckets[reference & grants->mask];
}

/* ---- blocks */

static void leave_idle(struct xen_grants *grants, struct block *block)
{
    *(block->newer != NULL ? &block->newer->older : &grants->newest) = block->older;
    *(block->older != NULL ? &block->older->newer : &grants->oldest) = block->newer;
}

static void become_idle(struct xen_grants *grants, struct block *block)
{
    block->newer = NULL;
    block->older = grants->newest;
    *(block->older != NULL ? &block->older->newer : &grants->oldest) = block;
    grants->newest = block;
}

static void unmap_block(struct xen_grants *grants, struct block *block)
{
    for (uint32_t i = 0; i < block->mapping.pages; i++) {
        struct page **link = bucket_of(grants, block->pages[i].reference);
        while (*link != &block->pages[i]) {
            link = &(*link)->next;
        }
        *link = block->pages[i].next;
    }
    grants->mapped -= block->mapping.pages;
    leave_idle(grants, block);
    xen_unmap(grants->transport, &block->mapping);
    free(block);
}

/* Unmap idle blocks, the least recently used first, until `more` pages fit the limit. */
static void make_room(struct xen_grants *grants, uint32_t more)
{
    uint32_t limit = more < grants->limit ? grants->limit - more : 0;

    while (grants->mapped > limit && grants->oldest != NULL) {
        unmap_block(grants, grants->oldest);
    }
}

/* A new block of these references, idle. 0 or an errno. */
static int map_block(struct xen_grants *grants, const uint32_t *references, uint32_t count, bool writable)
{
    struct block *block = malloc(sizeof *block + count * sizeof block->pages[0]);

    if (block == NULL) {
        return ENOMEM;
    }
    make_room(grants, count);
    int error = xen_map(grants->transport, references, count, writable, &block->mapping);
    if (error != 0) {
        free(block);
        return error;
    }
    block->held = 0;
    for (uint32_t i = 0; i < count; i++) {
        struct page **bucket = bucket_of(grants, references[i]);
        block->pages[i] = (struct page){
            .next = *bucket,
            .block = block,
            .memory = block->mapping.memory + (size_t)i * XEN_PAGE,
            .reference = references[i],
            .writable = writable,
        };
        *bucket = &block->pages[i];
    }
    grants->mapped += count;
    become_idle(grants, block);
    return 0;
}

/* ---- holding */

static struct page *find(struct xen_grants *grants, uint32_t reference, bool writable)
{
    struct page *found = NULL;

    for (struct page *page = *bucket_of(grants, reference); page != NULL; page = page->next) {
        if (page->reference == reference && (page->writable || !writable)) {
            if (page->writable == writable) {
                return page;
            }
            found = page;
        }
    }
    return found;
}

static uint8_t *hold_page(struct xen_grants *grants, struct page *page)
{
    if (page->holds++ == 0 && page->block->held++ == 0) {
        leave_idle(grants, page->block);
    }
    return page->memory;
}

static void release_page(struct xen_grants *grants, struct page *page)
{
    if (--page->holds == 0 && --page->block->held == 0) {
        become_idle(grants, page->block);
    }
}

static void release_pages(struct xen_grants *grants, const uint32_t *references, uint32_t count, bool writable)
{
    for (uint32_t i = 0; i < count; i++) {
        release_page(grants, find(grants, references[i], writable));
    }
}

/* The first of `references` that are not mapped, each once, at most a block of them; their number. */
static uint32_t find_missing(struct xen_grants *grants, const uint32_t *references, uint32_t count, bool writable,
                             uint32_t *missing)
{
    uint32_t found = 0;

    for (uint32_t i = 0; i < count && found < BLOCK_PAGES; i++) {
        if (find(grants, references[i], writable) != NULL) {
            continue;
        }
        uint32_t known = 0;
        while (known < found && missing[known] != references[i]) {
            known++;
        }
        missing[known] = references[i];
        found += known == found;
    }
    return found;
}

static int hold_pages(struct xen_grants *grants, const uint32_t *references, uint32_t count, bool writable,
                      uint8_t **memory)
{
    uint32_t missing[BLOCK_PAGES];

    for (uint32_t i = 0; i < count; i++) {
        struct page *page = find(grants, references[i], writable);
        if (page == NULL) {
            uint32_t number = find_missing(grants, references + i, count - i, writable, missing);
            int error = map_block(grants, missing, number, writable);
            if (error != 0) {
                release_pages(grants, references, i, writable);
                return error;
            }
            page = find(grants, references[i], writable);
        }
        memory[i] = hold_page(grants, page);
    }
    return 0;
}

int xen_grants_hold(struct xen_grants *grants, const uint32_t *references, uint32_t count, bool writable,
                    uint8_t **memory)
{
    pthread_mutex_lock(&grants->mutex);
    int error = hold_pages(grants, references, count, writable, memory);
    if (error != 0) {
        make_room(grants, 0);
    }
    pthread_mutex_unlock(&grants->mutex);
    return error;
}

void xen_grants_release(struct xen_grants *grants, const uint32_t *references, uint32_t count, bool writable)
{
    pthread_mutex_lock(&grants->mutex);
    release_pages(grants, references, count, writable);
    make_room(grants, 0);
    pthread_mutex_unlock(&grants->mutex);
}

void xen_grants_free(struct xen_grants *grants)
{
    while (grants->oldest != NULL) {
        unmap_block(grants, grants->oldest);
    }
    pthread_mutex_destroy(&grants->mutex);
    free(grants);
}
