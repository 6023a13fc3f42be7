/* The copy of one window, which the threads of the reader call. */
#ifndef TAPFS_COPYING_INTERNAL_H
#define TAPFS_COPYING_INTERNAL_H

#include <pthread.h>

#include "copying/copying.h"

/* Copy the ranges of a window into its target; who holds `writing` writes. */
void copy_window(tapfs_window *window, tapfs_disk *source, pthread_mutex_t *writing);

#endif
