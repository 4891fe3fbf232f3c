"""Recent architectures, written small and readable from their papers; `registry.ARCHITECTURES` lists them. torch is imported when one is built."""
