/*
 * A writable disk of one layer and the owner that supplies its maps and places, for programs that run a server of the
 * engine with all its threads. Every byte that is ever written depends on its offset alone, so whatever the order, a
 * read finds that byte or zero.
 */
#ifndef OWNED_DISK_H
#define OWNED_DISK_H

#include <stdint.h>

#include "serving/serving.h"

#define GRANULE 4096u
#define UNIT (16 * GRANULE)
#define SIZE (8 * UNIT)

#define REQUIRE(condition) ((condition) ? (void)0 : die(#condition, __FILE__, __LINE__))

extern tapfs_disk *disk;

void die(const char *what, const char *file, int line) __attribute__((noreturn));
uint8_t byte_at(uint64_t offset);
void owned_disk_open(const char *path);
/* One more disk of the same file, which the caller frees before the first is closed. */
tapfs_disk *owned_disk_again(void);
/* Looks at all bytes of the file first. */
void owned_disk_close(void);
/* Supply the map or the place that a READ or WRITE of a disk lacks. */
void give_what_is_missing(tapfs_disk *of, const tapfs_parked *parked);
void forget_map(tapfs_disk *of, uint64_t offset, uint64_t length);
/* Forget a part of the map, execute a plan, quiesce. */
void disturb_disk(unsigned *seed);

#endif
