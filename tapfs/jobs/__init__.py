"""Work over whole disks: convert, compare, create, check, commit, rebase."""
