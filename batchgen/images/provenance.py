"""Marks image files as made by a generative model, for people and machines that find them alone.

The mark is an XMP packet (ISO 16684-1) with the property DigitalSourceType of the IPTC Photo
Metadata Standard. It depends on nothing but this constant, so equal pixels give equal files.
"""

from __future__ import annotations

SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
PACKET = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about=""'
    ' xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"'
    f' Iptc4xmpExt:DigitalSourceType="{SOURCE_TYPE}"/>'
    "</rdf:RDF></x:xmpmeta>"
).encode()
# PNG specification, third edition, 11.3.3.4: keyword, no compression, no language, no translation.
PNG_TEXT = b"XML:com.adobe.xmp\0" + b"\0\0" + b"\0" + b"\0" + PACKET
