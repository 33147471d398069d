"""Buckets of S3 (and what speaks its protocol) and of Google Cloud Storage: the requests a run folder needs.

Requests are repeated a few times while the store is unreachable, busy or broken, with growing pauses. Credentials and
endpoint come from the standard chain of each library (AWS_PROFILE, AWS_ENDPOINT_URL, roles of the machine; application
default credentials) and are never written anywhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from rayexpand.storage.files import Entry, StorageDenied

SINGLE_PUT_BYTES = 5 << 30  # the most S3 takes in one PutObject; GCS has no such limit
PART_BYTES = 64 << 20  # of a multipart upload; S3 takes 10,000 parts
TRIES = 6  # of one request: about 15 s of pauses, 31 s at most, beside the timeouts
CONNECT_S, READ_S = 10, 60
GCS_TRYING_S = 200.0  # one request with its repetitions; more than two of its timeouts
PARALLEL = 16  # requests worth having under way at once
STALE_UPLOAD_S = 86_400  # unfinished multipart uploads older than this are aborted
TAG = "rayexpand-put"


@dataclass(frozen=True, slots=True)
class Head:
    """What a store knows of an object."""

    size: int
    tag: str  # of the publication that wrote it, "" for another object


class Bucket(Protocol):
    """The requests a run folder needs, below one bucket. Objects that are not there are None or absent."""

    def create(self, key: str, content: bytes, tag: str, written: Callable[[], None]) -> bool:
        """Writes an object where there is none, else returns False. `written` is called when all bytes are in the
        store and only their name is missing, where the store has that moment.
        """

    def put(self, key: str, content: bytes, tag: str = "") -> None: ...

    def head(self, key: str) -> Head | None: ...

    def get(self, key: str, start: int = 0, stop: int | None = None) -> bytes | None: ...

    def tail(self, key: str, size: int) -> tuple[bytes, int] | None:
        """The last `size` bytes of an object, and how many it has."""

    def entries(self, prefix: str) -> Iterator[tuple[str, Entry]]:
        """Objects whose key is `prefix` and more, without a further `/`."""

    def delete(self, key: str) -> None: ...

    def sweep(self, prefix: str) -> int: ...

    def fault(self, error: Exception) -> tuple[str, str] | None:
        """(what is wrong, what to do next) if the store refuses, ("", cause) if it fails, None for other errors."""


# S3 ------------------------------------------------------------------------------------------------------------------


class S3Bucket:
    """A bucket by botocore, whose standard retries repeat timeouts, throttling and 5xx."""

    def __init__(self, name: str) -> None:
        from botocore.config import Config
        from botocore.session import get_session

        self._bucket = {"Bucket": name}
        self._client = get_session().create_client("s3", config=Config(
            connect_timeout=CONNECT_S, read_timeout=READ_S, max_pool_connections=2 * PARALLEL,
            retries={"mode": "standard", "total_max_attempts": TRIES}))
        self._parts_are_conditional = False

    def create(self, key: str, content: bytes, tag: str, written: Callable[[], None]) -> bool:
        if len(content) > SINGLE_PUT_BYTES:
            if not self._parts_are_conditional:
                self._probe_parts(f"{key}.probe-{tag}")
                self._parts_are_conditional = True
            return self._create_in_parts(key, content, tag, written)
        return self._conditionally(self._client.put_object, Key=key, Body=content, Metadata={TAG: tag})

    def _conditionally(self, request: Callable[..., Any], **fields: Any) -> bool:
        from botocore.exceptions import ClientError

        try:
            request(**self._bucket, **fields, IfNoneMatch="*")
        except ClientError as error:
            # 412: taken. 409: another conditional write is under way. 404: a lost reply of ours closed this upload.
            if _http_status(error) in (409, 412) or error.response["Error"]["Code"] == "NoSuchUpload":
                return False
            raise
        return True

    def _create_in_parts(self, key: str, content: bytes, tag: str, written: Callable[[], None]) -> bool:
        upload = self._client.create_multipart_upload(**self._bucket, Key=key, Metadata={TAG: tag})["UploadId"]
        where, won = {**self._bucket, "Key": key, "UploadId": upload}, False
        try:
            parts = []
            view = memoryview(content)
            for number, start in enumerate(range(0, len(view), PART_BYTES), 1):
                body = view[start:start + PART_BYTES].tobytes()
                answer = self._client.upload_part(**where, PartNumber=number, Body=body)
                checks = {name: value for name, value in answer.items() if name.startswith("Checksum")
                          and name != "ChecksumType"}
                parts.append({"PartNumber": number, "ETag": answer["ETag"], **checks})
            written()
            won = self._conditionally(self._client.complete_multipart_upload, Key=key, UploadId=upload,
                                      MultipartUpload={"Parts": parts})
        finally:
            if not won:
                self._abort(where)
        return won

    def _abort(self, where: dict[str, Any]) -> None:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            self._client.abort_multipart_upload(**where)
        except (BotoCoreError, ClientError):
            return  # closed already, or `sweep` aborts it a day later

    def _probe_parts(self, key: str) -> None:
        """The first upload in parts shows that a second one would be refused. Raises StorageDenied if not."""
        self.put(key, b"probe")
        try:
            replaced = self._create_in_parts(key, b"probe", "probe", lambda: None)
        finally:
            self.delete(key)
        if replaced:
            raise StorageDenied(f"{key}: this store lets a multipart upload replace an object (If-None-Match has no "
                                f"effect on CompleteMultipartUpload). Keep files below {SINGLE_PUT_BYTES:,} bytes with "
                                "a smaller sampler.shard_images, or set store.single_writer: true.")

    def put(self, key: str, content: bytes, tag: str = "") -> None:
        self._client.put_object(**self._bucket, Key=key, Body=content, Metadata={TAG: tag} if tag else {})

    def head(self, key: str) -> Head | None:
        from botocore.exceptions import ClientError

        try:
            answer = self._client.head_object(**self._bucket, Key=key)
        except ClientError as error:
            if _http_status(error) == 404:
                return None
            raise
        return Head(answer["ContentLength"], answer["Metadata"].get(TAG, ""))

    def get(self, key: str, start: int = 0, stop: int | None = None) -> bytes | None:
        found = self._get(key, {} if stop is None else {"Range": f"bytes={start}-{stop - 1}"})
        return None if found is None else found[0]

    def tail(self, key: str, size: int) -> tuple[bytes, int] | None:
        return self._get(key, {"Range": f"bytes=-{size}"})

    def _get(self, key: str, wanted: dict[str, str]) -> tuple[bytes, int] | None:
        """Content and whole size of an object. A body that breaks off is asked for again."""
        from botocore.exceptions import ClientError, HTTPClientError, IncompleteReadError

        for left in reversed(range(TRIES)):
            try:
                answer = self._client.get_object(**self._bucket, Key=key, **wanted)
                body = answer["Body"].read()
            except ClientError as error:
                code = error.response["Error"]["Code"]
                if code == "NoSuchKey" or (code == "404" and _http_status(error) == 404):
                    return None
                if code == "InvalidRange":
                    return b"", 0
                raise
            except (HTTPClientError, IncompleteReadError):
                if not left:
                    raise
                time.sleep(0.1 * 2**(TRIES - left))
            else:
                return body, int(answer.get("ContentRange", f"/{len(body)}").rpartition("/")[2])
        raise AssertionError("unreachable")

    def entries(self, prefix: str) -> Iterator[tuple[str, Entry]]:
        pages = self._client.get_paginator("list_objects_v2").paginate(**self._bucket, Prefix=prefix, Delimiter="/")
        for page in pages:
            for found in page.get("Contents", ()):
                yield found["Key"], Entry(found["Size"], found["LastModified"].timestamp())

    def delete(self, key: str) -> None:
        self._client.delete_object(**self._bucket, Key=key)

    def sweep(self, prefix: str) -> int:
        pages = self._client.get_paginator("list_multipart_uploads").paginate(**self._bucket, Prefix=prefix)
        stale = [upload for page in pages for upload in page.get("Uploads", ())
                 if upload["Initiated"].timestamp() < time.time() - STALE_UPLOAD_S]
        for upload in stale:
            self._abort({**self._bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]})
        return len(stale)

    @staticmethod
    def fault(error: Exception) -> tuple[str, str] | None:
        from botocore import exceptions as raised

        if isinstance(error, raised.NoCredentialsError | raised.CredentialRetrievalError | raised.ProfileNotFound
                      | raised.PartialCredentialsError | raised.UnauthorizedSSOTokenError):
            return f"no usable credentials ({error})", _S3_REMEDY
        if isinstance(error, raised.ClientError):
            code, status = error.response["Error"]["Code"], _http_status(error)
            told = f"{code}, HTTP {status}: {error.response['Error'].get('Message', '')}".rstrip(": ")
            if code == "NoSuchBucket":
                return "the bucket does not exist", "Create it, or correct `out`."
            if status == 501 or code == "NotImplemented":
                return (f"the store does not know conditional writes ({told})", "Use a store that does, or set "
                        "store.single_writer: true and never run two drivers at once.")
            if status in (301, 400, 401, 403) and code != "RequestTimeout":
                return f"refused ({told})", _S3_REMEDY
            return "", f"the store fails ({told}) after {TRIES} tries"
        if isinstance(error, raised.BotoCoreError):
            return "", f"the store cannot be reached ({type(error).__name__}: {error}) after {TRIES} tries"
        return None


_S3_REMEDY = ("Give this user s3:GetObject, s3:PutObject, s3:DeleteObject and s3:ListBucket there, and check the "
              "profile, region and endpoint (AWS_PROFILE, AWS_REGION, AWS_ENDPOINT_URL), then run the same command "
              "again.")


def _http_status(error: Any) -> int:
    return error.response["ResponseMetadata"].get("HTTPStatusCode", 0)


# Google Cloud Storage ------------------------------------------------------------------------------------------------


class GcsBucket:
    """A bucket by google-cloud-storage, whose retries repeat timeouts, throttling and 5xx."""

    def __init__(self, name: str) -> None:
        from google.cloud import storage
        from google.cloud.storage.retry import DEFAULT_RETRY

        self._client = storage.Client()
        self._bucket = self._client.bucket(name)
        self._options = {"retry": DEFAULT_RETRY.with_timeout(GCS_TRYING_S), "timeout": (CONNECT_S, READ_S)}

    def create(self, key: str, content: bytes, tag: str, written: Callable[[], None]) -> bool:
        from google.api_core.exceptions import Conflict, PreconditionFailed

        try:
            self._upload(key, content, tag, if_generation_match=0)
        except (PreconditionFailed, Conflict):
            return False
        return True

    def put(self, key: str, content: bytes, tag: str = "") -> None:
        self._upload(key, content, tag)

    def _upload(self, key: str, content: bytes, tag: str, **condition: int) -> None:
        blob = self._bucket.blob(key)
        if tag:
            blob.metadata = {TAG: tag}
        blob.upload_from_string(content, "application/octet-stream", **condition, **self._options)

    def head(self, key: str) -> Head | None:
        blob = self._bucket.get_blob(key, **self._options)
        return None if blob is None else Head(blob.size, (blob.metadata or {}).get(TAG, ""))

    def get(self, key: str, start: int = 0, stop: int | None = None) -> bytes | None:
        from google.api_core.exceptions import NotFound

        wanted = {} if stop is None else {"start": start, "end": stop - 1}
        try:
            return self._bucket.blob(key).download_as_bytes(**wanted, **self._options)
        except NotFound:
            return None

    def tail(self, key: str, size: int) -> tuple[bytes, int] | None:
        head = self.head(key)
        if head is None or not head.size:
            return None if head is None else (b"", 0)
        content = self.get(key, max(0, head.size - size), head.size)
        return None if content is None else (content, head.size)

    def entries(self, prefix: str) -> Iterator[tuple[str, Entry]]:
        fields = "items(name,size,updated),nextPageToken"
        for blob in self._client.list_blobs(self._bucket, prefix=prefix, delimiter="/", fields=fields, **self._options):
            yield blob.name, Entry(blob.size, blob.updated.timestamp())

    def delete(self, key: str) -> None:
        from google.api_core.exceptions import NotFound

        try:
            self._bucket.blob(key).delete(**self._options)
        except NotFound:
            return

    def sweep(self, prefix: str) -> int:
        return 0  # unfinished uploads of GCS have no name and expire by themselves

    @staticmethod
    def fault(error: Exception) -> tuple[str, str] | None:
        import requests
        from google.api_core import exceptions as raised
        from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, RefreshError
        from google.cloud.storage.exceptions import DataCorruption

        if isinstance(error, DefaultCredentialsError | RefreshError):
            return f"no usable credentials ({error})", _GCS_REMEDY
        if isinstance(error, raised.NotFound):
            return "the bucket does not exist", "Create it, or correct `out`."
        if isinstance(error, raised.ClientError) and not isinstance(error, raised.TooManyRequests):
            return f"refused (HTTP {error.code}: {error.message})", _GCS_REMEDY
        if isinstance(error, raised.GoogleAPIError | GoogleAuthError | DataCorruption | requests.RequestException):
            return "", f"the store fails or cannot be reached ({type(error).__name__}: {error}) after many tries"
        return None


_GCS_REMEDY = ("Give this user the role Storage Object User there (gcloud auth application-default login, or the "
               "machine's service account), then run the same command again.")
BUCKETS: dict[str, Any] = {"s3": S3Bucket, "gs": GcsBucket}
