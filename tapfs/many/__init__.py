"""Work over many images: surveys and batches, in processes of this machine or on the workers of a Dask cluster."""
