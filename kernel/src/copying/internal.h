/* The copy and the packing of one window, which the threads of the reader call. */
#ifndef TAPFS_COPYING_INTERNAL_H
#define TAPFS_COPYING_INTERNAL_H

#include <pthread.h>

#include "copying/copying.h"
#include "engine/bytes.h"

/* Copy the ranges of a window into its target; who holds `writing` writes. window_copy.c */
void copy_window(tapfs_window *window, tapfs_disk *source, pthread_mutex_t *writing);
/* Pack a window that was read; `packers` are the thread's, made when they are first wanted. window_pack.c */
void pack_window(tapfs_window *window, tapfs_packers **packers);

#endif
