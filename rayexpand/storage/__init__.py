"""Results out: folders on disks, in S3 and GCS; Parquet tables; checkpoints."""
