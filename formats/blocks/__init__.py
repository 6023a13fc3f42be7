"""Images with one table of large blocks: the parts that VDI, VHD and Parallels drivers share.

`layout.py` says what an entry means, `table.py` reads and changes the table, `reader.py` maps, `writer.py` allocates
and plans, `check.py` compares the table with the file. A driver gives a `BlockLayout` and overrides the methods that
its format does otherwise.
"""
