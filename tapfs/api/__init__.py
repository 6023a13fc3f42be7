"""The functions of `import tapfs`, by subject: opening, jobs, mounts, and the asynchronous face of an image."""
